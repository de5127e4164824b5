"""Payload <-> one flat uint8 tensor: k ascending indices below n, and k values.

Indices: Elias-Fano (Elias 1974, Fano 1971). With l = floor(log2(n / k)) each index is split into its l low bits, stored
as they are, and its high part, stored in unary: bit (index >> l) + i is set for the i-th index. The length depends
on n and k only, so every rank's message has the same length; below a density of 1/32 it lies within 0.6 bit per index
of the entropy (0.8 at 1/4).

Values: fp32, fp16 or bf16. fp16 carries one shared power-of-two exponent (one signed byte), because accumulated
gradients of 1e-8 would otherwise vanish below its smallest number and those of 1e5 become infinite.

`encode` also returns what a receiver will decode; the difference stays in the residual: sent + kept = accumulated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrobust.errors import CodecError


@dataclass(frozen=True)
class ValueCode:
    """A code for float32 values: `overhead_bytes + k * bytes_per_value` bytes for k of them."""

    name: str
    bytes_per_value: int
    overhead_bytes: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    def num_bytes(self, k: int) -> int:
        return self.overhead_bytes + k * self.bytes_per_value


def index_num_bytes(n: int, k: int) -> int:
    """Length in bytes of k Elias-Fano coded indices below n."""
    low_bits = _low_bits(n, k)
    return _bytes(k + (n >> low_bits) + 1) + _bytes(k * low_bits)


def num_bytes(n: int, k: int, code: ValueCode) -> int:
    """Length in bytes of a payload of k out of n coordinates."""
    return index_num_bytes(n, k) + code.num_bytes(k)


def encode(indices: Tensor, values: Tensor, n: int, code: ValueCode) -> tuple[Tensor, Tensor]:
    """Codes `indices` (k,) int64, strictly ascending, below n, and `values` (k,) float32.

    Returns the payload (num_bytes(n, k, code),) uint8 and the values (k,) float32 as a receiver decodes them.
    """
    coded = code.encode(values)
    return torch.cat([_encode_indices(indices, n), coded]), code.decode(coded)


def decode(payload: Tensor, n: int, k: int, code: ValueCode) -> tuple[Tensor, Tensor]:
    """Indices (k,) int64, strictly ascending, below n, and values (k,) float32; raises CodecError otherwise."""
    wanted = num_bytes(n, k, code)
    if payload.numel() != wanted:
        raise CodecError(f"payload of {payload.numel()} bytes, expected {wanted} for {k} of {n} coordinates")
    split = index_num_bytes(n, k)
    return _decode_indices(payload[:split], n, k), code.decode(payload[split:])


def _low_bits(n: int, k: int) -> int:
    return max(0, (n // k).bit_length() - 1)


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _encode_indices(indices: Tensor, n: int) -> Tensor:
    k = indices.numel()
    low_bits = _low_bits(n, k)
    unary = torch.zeros(8 * _bytes(k + (n >> low_bits) + 1), dtype=torch.uint8, device=indices.device)
    unary[(indices >> low_bits) + torch.arange(k, device=indices.device)] = 1
    if low_bits == 0:
        return pack_bits(unary)
    shifts = torch.arange(low_bits, device=indices.device)
    low = ((indices[:, None] >> shifts) & 1).to(torch.uint8).view(-1)
    padding = torch.zeros(8 * _bytes(k * low_bits) - k * low_bits, dtype=torch.uint8, device=indices.device)
    return torch.cat([pack_bits(unary), pack_bits(torch.cat([low, padding]))])


def _decode_indices(payload: Tensor, n: int, k: int) -> Tensor:
    low_bits = _low_bits(n, k)
    split = _bytes(k + (n >> low_bits) + 1)
    ones = torch.nonzero(unpack_bits(payload[:split])).view(-1)
    if ones.numel() != k:
        raise CodecError(f"{ones.numel()} indices in a payload of {k}")
    indices = (ones - torch.arange(k, device=ones.device)) << low_bits
    if low_bits:
        bits = unpack_bits(payload[split:])[: k * low_bits].view(k, low_bits)
        indices += (bits.to(torch.int64) << torch.arange(low_bits, device=ones.device)).sum(dim=1)
    if int(indices[-1]) >= n or not bool((indices[1:] > indices[:-1]).all()):
        raise CodecError(f"indices that are not strictly ascending below {n}")
    return indices


def pack_bits(bits: Tensor) -> Tensor:
    """(8 m,) of 0 and 1 -> (m,) uint8, least significant bit first."""
    if bits.device.type == "cpu":  # torch has no packbits
        return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """(m,) uint8 -> (8 m,) of 0 and 1, uint8."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little"))
    return ((packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1).view(-1)


def _cast_encode(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda values: values.to(dtype).view(torch.uint8)


def _cast_decode(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    # clone: a view of a message need not begin at a multiple of the value's size
    return lambda coded: coded.clone().view(dtype).to(torch.float32)


FP16_TOP = 14  # the largest magnitude is scaled into [2^13, 2^14]: a factor of 4 below overflow


def _fp16_encode(values: Tensor) -> Tensor:
    exponent = torch.frexp(values.abs().max()).exponent.clamp(-112, 127)
    scaled = torch.ldexp(torch.ldexp(values, -exponent), torch.tensor(FP16_TOP, device=values.device))
    return torch.cat([exponent.to(torch.int8).view(1).view(torch.uint8), scaled.to(torch.float16).view(torch.uint8)])


def _fp16_decode(coded: Tensor) -> Tensor:
    exponent = coded[:1].view(torch.int8).to(torch.int32) - FP16_TOP
    return torch.ldexp(coded[1:].clone().view(torch.float16).to(torch.float32), exponent)


VALUE_CODES: dict[str, ValueCode] = {
    code.name: code
    for code in (
        ValueCode("fp32", 4, 0, _cast_encode(torch.float32), _cast_decode(torch.float32)),
        ValueCode("fp16", 2, 1, _fp16_encode, _fp16_decode),
        ValueCode("bf16", 2, 0, _cast_encode(torch.bfloat16), _cast_decode(torch.bfloat16)),
    )
}
