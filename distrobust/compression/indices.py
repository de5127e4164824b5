"""Ascending indices <-> bytes of a length known in advance: Elias-Fano or Rice.

Elias-Fano (Elias 1974, Fano 1971). With l = floor(log2(n / k)) each index is split into its l low bits, stored as they
are, and its high part, stored in unary: bit (index >> l) + i is set for the i-th index. The length depends on n and k
only; below a density of 1/32 it lies within 0.6 bit per index of the entropy (0.8 at 1/4).

Rice (Golomb 1966, Rice 1979): the same for the gaps between indices: gap >> b in unary, its b low bits as they are.
Within 0.15 bit of the entropy for indices without pattern, but the unary part depends on them. So a message has room
for what k indices without pattern need and a little more; where that is too little (indices in clusters), those that
matter least are left out and stay in the residual: the length is known in advance here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distrobust.compression import bits
from distrobust.errors import CodecError

ROOM = 0.015  # of a Rice code's unary part, beyond its mean: clusters that repeat over a layer's rows
SPREADS = 1.0  # and standard deviations of it beyond: one in six messages leaves out about 1 % of its indices


@dataclass(frozen=True)
class IndexCode:
    """A code for k ascending indices below n.

    keep: which of (k,) int64 indices fit, given (k,) magnitudes; None for all. encode: (k',) -> bytes. decode: the
    inverse.
    """

    name: str
    num_bytes: Callable[[int, int], int]
    keep: Callable[[Tensor, Tensor, int], Tensor | None]
    encode: Callable[[Tensor, int, int], Tensor]
    decode: Callable[[Tensor, int, int], Tensor]


def _low_bits(n: int, k: int) -> int:
    return max(0, (n // k).bit_length() - 1)


def elias_fano_plan(n: int, k: int) -> tuple[int, int]:
    """Low bits of an index, and bytes of the unary part."""
    low = _low_bits(n, k)
    return low, bits.num_bytes(k + (n >> low) + 1)


def _elias_fano_num_bytes(n: int, k: int) -> int:
    low, unary = elias_fano_plan(n, k)
    return unary + bits.packed_bytes(k, low)


def _elias_fano_encode(indices: Tensor, n: int, k: int) -> Tensor:
    low = _low_bits(n, k)
    places = (indices >> low) + torch.arange(k, device=indices.device)
    return torch.cat([bits.mark(places, k + (n >> low) + 1), bits.pack(indices, low)])


def _elias_fano_decode(payload: Tensor, n: int, k: int) -> Tensor:
    low = _low_bits(n, k)
    split = bits.num_bytes(k + (n >> low) + 1)
    ones = bits.marked(payload[:split], k + 1)
    if ones.numel() != k:
        found = "more" if ones.numel() > k else f"{ones.numel()}"
        raise CodecError(f"{found} indices in a payload of {k}")
    high = ones - torch.arange(k, device=ones.device)
    return _checked((high << low) | bits.unpack(payload[split:], k, low), n)


def _rice_plan(n: int, k: int) -> tuple[int, int, int]:
    """Low bits b of a gap, bytes that say how many indices there are, and bytes for both parts of their code."""
    density = k / n
    choices = []
    for low in range(max(0, _low_bits(n, k) - 1), _low_bits(n, k) + 2):
        # gaps of indices without pattern are geometric: P(gap > g) = (1 - density)^g
        stay = math.exp((1 << low) * math.log1p(-density)) if density < 1.0 else 0.0
        zeros = k * stay / (1.0 - stay)
        spread = math.sqrt(k * stay) / (1.0 - stay)
        room = min(zeros * (1.0 + ROOM) + SPREADS * spread, n >> low)
        choices.append((bits.num_bytes(k + math.ceil(room)) + bits.packed_bytes(k, low), low))
    area, low = min(choices)
    return low, 2 if k < 1 << 16 else 4, area


def _rice_num_bytes(n: int, k: int) -> int:
    _, count_bytes, area = _rice_plan(n, k)
    return count_bytes + area


def _rice_keep(indices: Tensor, magnitudes: Tensor, n: int) -> Tensor | None:
    """Positions of the indices to keep, None if all fit."""
    k = indices.numel()
    low, _, area = _rice_plan(n, k)

    def surplus_bits(left: Tensor) -> int:
        unary = left.numel() + int((_gaps(left) >> low).sum())
        return 8 * (bits.num_bytes(unary) + bits.packed_bytes(left.numel(), low) - area)

    if surplus_bits(indices) <= 0:
        return None
    kept = torch.arange(k, device=indices.device)
    while (surplus := surplus_bits(indices[kept])) > 0 and kept.numel() > 1:
        # one left out frees its low bits, and its one less what merging two gaps adds: half a bit on average
        num_out = min(math.ceil(surplus / (low + 0.5)), kept.numel() - 1)
        order = torch.argsort(magnitudes[kept], stable=True)
        kept = kept[torch.sort(order[num_out:]).values]
    return kept


def _rice_encode(indices: Tensor, n: int, k: int) -> Tensor:
    low, count_bytes, area = _rice_plan(n, k)
    gaps = _gaps(indices)
    places = torch.cumsum((gaps >> low) + 1, dim=0) - 1
    unary, packed = bits.mark(places, int(places[-1]) + 1), bits.pack(gaps, low)
    count = torch.tensor([indices.numel()], device=indices.device).view(torch.uint8)[:count_bytes]
    return torch.cat([count, unary, packed, packed.new_zeros(area - unary.numel() - packed.numel())])


def _rice_decode(payload: Tensor, n: int, k: int) -> Tensor:
    low, count_bytes, area = _rice_plan(n, k)
    octets = torch.zeros(8, dtype=torch.uint8, device=payload.device)
    octets[:count_bytes] = payload[:count_bytes]
    count = int(octets.view(torch.int64))
    longest = bits.num_bytes(k + (n >> low) + 1)
    if not 1 <= count <= k:
        raise CodecError(f"a payload that says it holds {count} indices, of at most {k}")
    ones = bits.marked(payload[count_bytes : count_bytes + min(area, longest)], count)
    if ones.numel() < count:
        raise CodecError(f"{ones.numel()} indices in a payload that says {count}")
    split = count_bytes + bits.num_bytes(int(ones[-1]) + 1)
    packed = payload[split : split + bits.packed_bytes(count, low)]
    if packed.numel() < bits.packed_bytes(count, low):
        raise CodecError(f"payload ends within the low bits of {count} indices")
    high = ones.diff(prepend=ones.new_full((1,), -1)) - 1
    gaps = (high << low) | bits.unpack(packed, count, low)
    return _checked(torch.cumsum(gaps + 1, dim=0) - 1, n)


def _gaps(indices: Tensor) -> Tensor:
    """Indices skipped before each one."""
    return indices.diff(prepend=indices.new_full((1,), -1)) - 1


def _checked(indices: Tensor, n: int) -> Tensor:
    if int(indices[-1]) >= n or not bool((indices[1:] > indices[:-1]).all()):
        raise CodecError(f"indices that are not strictly ascending below {n}")
    return indices


INDEX_CODES: dict[str, IndexCode] = {
    code.name: code
    for code in (
        IndexCode("elias_fano", _elias_fano_num_bytes, lambda *_: None, _elias_fano_encode, _elias_fano_decode),
        IndexCode("rice", _rice_num_bytes, _rice_keep, _rice_encode, _rice_decode),
    )
}
