"""What one rank sends for one bucket: a header, then one payload per section.

    checksum 4 bytes | status 1 byte | one bit a parameter: had a gradient | side values, fp32 | payloads

The length follows from the layout alone. The checksum covers everything after it and starts from the layout, so a
flipped bit, a message of another step and a receive buffer that nobody filled are all refused.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from distrobust.compression import codec
from distrobust.compression.codec import ValueCode
from distrobust.errors import CodecError

_CHECKSUM_BYTES = 4
NON_FINITE = 1


@dataclass(frozen=True)
class Section:
    """An index space of n coordinates, of which k are sent."""

    n: int
    k: int


@dataclass(frozen=True)
class Layout:
    """Everything about a message that sender and receiver must agree on beforehand."""

    sections: tuple[Section, ...]
    code: ValueCode
    num_parameters: int  # bits for "had a gradient"
    num_side: int = 0  # float32 side values, averaged over ranks by the receiver
    step: int = 0

    @property
    def header_bytes(self) -> int:
        return _CHECKSUM_BYTES + 1 + (self.num_parameters + 7) // 8 + 4 * self.num_side

    @property
    def num_bytes(self) -> int:
        return self.header_bytes + sum(codec.num_bytes(s.n, s.k, self.code) for s in self.sections)

    @property
    def seed(self) -> int:
        text = f"{self.sections}{self.code.name}{self.num_parameters}{self.num_side}{self.step}"
        return zlib.crc32(text.encode())


@dataclass(frozen=True)
class Message:
    """A decoded message: per section (indices (k,) int64, values (k,) float32)."""

    used: Tensor  # (num_parameters,) bool
    side: Tensor  # (num_side,) float32
    payloads: list[tuple[Tensor, Tensor]]


def pack(layout: Layout, used: Tensor, side: Tensor, payloads: list[Tensor]) -> Tensor:
    """One flat uint8 tensor of layout.num_bytes bytes."""
    bits = torch.zeros(8 * ((layout.num_parameters + 7) // 8), dtype=torch.uint8, device=used.device)
    bits[: layout.num_parameters] = used
    status = torch.zeros(1, dtype=torch.uint8, device=used.device)
    body = [status, codec.pack_bits(bits), side.to(torch.float32).view(torch.uint8), *payloads]
    return _seal(layout, torch.cat(body))


def pack_non_finite(layout: Layout, device: torch.device) -> Tensor:
    """A message of the same length that only says: this rank's gradient is not finite."""
    body = torch.zeros(layout.num_bytes - _CHECKSUM_BYTES, dtype=torch.uint8, device=device)
    body[0] = NON_FINITE
    return _seal(layout, body)


def unpack(layout: Layout, message: Tensor) -> Message | None:
    """The decoded message, None if its sender had a non-finite gradient; raises CodecError if it is damaged."""
    if message.numel() != layout.num_bytes:
        raise CodecError(f"message of {message.numel()} bytes, expected {layout.num_bytes}")
    body = message[_CHECKSUM_BYTES:]
    if not torch.equal(message[:_CHECKSUM_BYTES], _checksum(layout, body)):
        raise CodecError("checksum does not match: the message is corrupted, or comes from another step or layout")
    if int(body[0]) == NON_FINITE:
        return None
    at = 1 + (layout.num_parameters + 7) // 8
    used = codec.unpack_bits(body[1:at])[: layout.num_parameters].bool()
    side = body[at : at + 4 * layout.num_side].clone().view(torch.float32)
    at += 4 * layout.num_side
    payloads = []
    for section in layout.sections:
        size = codec.num_bytes(section.n, section.k, layout.code)
        payloads.append(codec.decode(body[at : at + size], section.n, section.k, layout.code))
        at += size
    return Message(used, side, payloads)


def _seal(layout: Layout, body: Tensor) -> Tensor:
    return torch.cat([_checksum(layout, body), body])


def _checksum(layout: Layout, body: Tensor) -> Tensor:
    """4 bytes: sum of (2 i + 1) * word_i modulo 2^32. Odd weights: no change within one word goes unseen."""
    padded = torch.nn.functional.pad(body, (0, -body.numel() % 4))
    words = padded.view(torch.int32).to(torch.int64)
    weights = torch.arange(1, 2 * words.numel(), 2, device=body.device)
    total = ((words * weights).sum() + layout.seed) & 0xFFFFFFFF
    return total.view(1).view(torch.uint8)[:_CHECKSUM_BYTES]
