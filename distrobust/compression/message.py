"""What one rank sends for one bucket: a header, then one payload.

    checksum 4 bytes | status 1 byte | one bit a parameter: had a gradient | side values, fp32 | payload

The length follows from the layout alone. The checksum covers everything after it and starts from the layout, so a
flipped bit, a message of another step and a receive buffer that nobody filled are all refused.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distrobust.compression import bits, codec, native
from distrobust.compression.codec import Code, Space
from distrobust.errors import CodecError

_CHECKSUM_BYTES = 4
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)  # as an int64
NON_FINITE = 1  # the sender's gradient is
DAMAGED = 2  # the sender could not read what it was sent


@dataclass(frozen=True)
class Layout:
    """Everything about a message that sender and receiver must agree on beforehand.

    A space with k = 0 has no payload.
    """

    space: Space
    code: Code
    num_parameters: int  # bits for "had a gradient"; none in a second hop
    num_side: int = 0  # float32 side values
    step: int = 0
    hop: int = 0  # of an exchange with several

    @cached_property
    def header_bytes(self) -> int:
        return _CHECKSUM_BYTES + 1 + bits.num_bytes(self.num_parameters) + 4 * self.num_side

    @cached_property
    def num_bytes(self) -> int:
        return self.header_bytes + (codec.num_bytes(self.space, self.code) if self.space.k else 0)

    @cached_property
    def seed(self) -> int:
        code = self.code.values.name + self.code.indices.name
        text = f"{self.space}{code}{self.num_parameters} {self.num_side} {self.step} {self.hop}"
        return zlib.crc32(text.encode())


@dataclass(frozen=True)
class Message:
    """A decoded message. `status` is 0, or why there is nothing else in it."""

    status: int
    used: Tensor  # (num_parameters,) bool
    side: Tensor  # (num_side,) float32
    indices: Tensor  # (k,) int64, ascending
    values: Tensor  # (k,) float32


def header(used: Tensor, side: Tensor) -> Tensor:
    """What comes before the payload, without its checksum. used (num_parameters,) bool, side (num_side,) float32."""
    flags = torch.zeros(8 * bits.num_bytes(used.numel()), dtype=torch.uint8, device=used.device)
    flags[: used.numel()] = used
    nothing = torch.zeros(_CHECKSUM_BYTES + 1, dtype=torch.uint8, device=used.device)  # and status 0
    return torch.cat([nothing, bits.pack_bits(flags), side.to(torch.float32).view(torch.uint8)])


def pack(layout: Layout, header: Tensor, payload: Tensor | None) -> Tensor:
    """One flat uint8 tensor of layout.num_bytes bytes."""
    return _sealed(layout, header.clone() if payload is None else torch.cat([header, payload]))


def pack_status(layout: Layout, status: int, device: torch.device) -> Tensor:
    """A message of the same length that only says why it has nothing to say."""
    message = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
    message[_CHECKSUM_BYTES] = status
    return _sealed(layout, message)


def unpack(layout: Layout, message: Tensor) -> Message:
    """The decoded message; raises CodecError if it is damaged."""
    check(layout, message)
    body = message[_CHECKSUM_BYTES:]
    at = 1 + bits.num_bytes(layout.num_parameters)
    used, side = body.new_zeros(0, dtype=torch.bool), body.new_zeros(0, dtype=torch.float32)
    if layout.num_parameters:
        used = bits.unpack_bits(body[1:at])[: layout.num_parameters].bool()
    if layout.num_side:
        side = body[at : at + 4 * layout.num_side].clone().view(torch.float32)
    at += 4 * layout.num_side
    status = int(body[0])
    if status or not layout.space.k:
        nothing = torch.zeros(0, dtype=torch.int64, device=message.device)
        return Message(status, used, side, nothing, nothing.to(torch.float32))
    return Message(status, used, side, *codec.decode(body[at:], layout.space, layout.code))


def check(layout: Layout, message: Tensor) -> None:
    """Raises CodecError if the message is damaged."""
    if message.numel() != layout.num_bytes:
        raise CodecError(f"message of {message.numel()} bytes, expected {layout.num_bytes}")
    if native.takes(message):
        is_whole = native.verify(message, layout.seed)
    else:
        is_whole = torch.equal(message[:_CHECKSUM_BYTES], _checksum(layout, message[_CHECKSUM_BYTES:]))
    if not is_whole:
        raise CodecError("checksum does not match: the message is corrupted, or comes from another step or layout")


def _sealed(layout: Layout, message: Tensor) -> Tensor:
    """`message`, which is changed, with its checksum."""
    if native.takes(message):
        native.seal(message, layout.seed)
    else:
        message[:_CHECKSUM_BYTES] = _checksum(layout, message[_CHECKSUM_BYTES:])
    return message


def _checksum(layout: Layout, body: Tensor) -> Tensor:
    """4 bytes: the upper half of (seed + sum of (2 i + 1) * word_i) * an odd constant, modulo 2^64.

    The sum itself, of 64 bits, changes with any word and with any two that change places; the constant (2^64 / golden
    ratio, Knuth's multiplicative hashing) spreads it over the upper half.
    """
    padded = torch.nn.functional.pad(body, (0, -body.numel() % 4))
    words = padded.view(torch.int32).to(torch.int64)
    weights = torch.arange(1, 2 * words.numel(), 2, device=body.device)
    total = ((words * weights).sum() + layout.seed) * _SPREAD
    return total.view(1).view(torch.uint8)[_CHECKSUM_BYTES:]
