"""Numbers of a few bits each, packed into bytes without gaps; the least significant bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distrobust.compression import native


def num_bytes(num_bits: int) -> int:
    """Bytes that hold `num_bits` bits."""
    return (num_bits + 7) // 8


def pack_bits(bits: Tensor) -> Tensor:
    """(8 m,) of 0 and 1 -> (m,) uint8."""
    if bits.device.type == "cpu":  # torch has no packbits
        return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """(m,) uint8 -> (8 m,) of 0 and 1, uint8."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little"))
    return ((packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1).view(-1)


def mark(places: Tensor, num_bits: int) -> Tensor:
    """(k,) int64 below num_bits -> (num_bytes(num_bits),) uint8 with these bits set."""
    if native.takes(places):
        marked = places.new_zeros(num_bytes(num_bits), dtype=torch.uint8)
        native.mark(places, marked)
        return marked
    bits = torch.zeros(8 * num_bytes(num_bits), dtype=torch.uint8, device=places.device)
    bits[places] = 1
    return pack_bits(bits)


def marked(packed: Tensor, room: int) -> Tensor:
    """(m,) uint8 -> ascending int64 places of the first `room` bits that are set, or of all, if there are fewer."""
    if native.takes(packed):
        return native.marked(packed, room)
    bits = unpack_bits(packed)
    if bits.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(bits.numpy())[:room])  # three times as fast as torch.nonzero
    return torch.nonzero(bits).view(-1)[:room]


def packed_bytes(k: int, width: int) -> int:
    """Length in bytes of `pack` for k numbers: whole groups of eight."""
    return num_bytes(k) * width


def pack(numbers: Tensor, width: int) -> Tensor:
    """(k,) int64, of which the low `width` bits (0 to 56) are kept -> (packed_bytes(k, width),) uint8.

    Eight numbers fill `width` bytes exactly: whole bytes are stored as columns of their own, and the bits above them
    are collected from eight numbers in one 64-bit word. No pass over single bits.
    """
    k = numbers.numel()
    if width == 0 or k == 0:
        return torch.zeros(0, dtype=torch.uint8, device=numbers.device)
    if native.takes(numbers):
        packed = numbers.new_empty(packed_bytes(k, width), dtype=torch.uint8)
        native.pack(numbers, width, packed)
        return packed
    padded = torch.zeros(8 * num_bytes(k), dtype=torch.int64, device=numbers.device)
    padded[:k] = numbers
    whole, rest = divmod(width, 8)
    columns = [padded.view(torch.uint8).view(-1, 8)[:, :whole].reshape(num_bytes(k), 8 * whole)]
    if rest:
        high = ((padded >> (8 * whole)) & ((1 << rest) - 1)).view(-1, 8)
        word = high[:, 0].clone(memory_format=torch.contiguous_format)
        for i in range(1, 8):
            word |= high[:, i] << (rest * i)
        columns.append(word.view(torch.uint8).view(-1, 8)[:, :rest])
    return torch.cat(columns, dim=1).view(-1)


def unpack(packed: Tensor, k: int, width: int) -> Tensor:
    """(packed_bytes(k, width),) uint8 -> (k,) int64, the inverse of `pack`."""
    if width == 0:
        return torch.zeros(k, dtype=torch.int64, device=packed.device)
    if native.takes(packed) and packed.numel() >= packed_bytes(k, width):
        numbers = packed.new_empty(k, dtype=torch.int64)
        native.unpack(packed, width, numbers)
        return numbers
    groups = num_bytes(k)
    padded = torch.zeros(groups * width, dtype=torch.uint8, device=packed.device)
    padded[: packed.numel()] = packed
    rows = padded.view(groups, width)
    whole, rest = divmod(width, 8)
    octets = torch.zeros((8 * groups, 8), dtype=torch.uint8, device=packed.device)
    octets[:, :whole] = rows[:, : 8 * whole].reshape(8 * groups, whole)
    numbers = octets.view(torch.int64).view(groups, 8)
    if rest:
        word = torch.zeros((groups, 8), dtype=torch.uint8, device=packed.device)
        word[:, :rest] = rows[:, 8 * whole :]
        collected = word.view(torch.int64).view(groups)
        mask = (1 << rest) - 1
        for i in range(8):
            numbers[:, i] |= ((collected >> (rest * i)) & mask) << (8 * whole)
    return numbers.view(-1)[:k]
