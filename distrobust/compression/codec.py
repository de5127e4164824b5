"""Payload <-> one flat uint8 tensor: k ascending indices below n, then k values. Its length follows from the space.

`encode` also returns what a receiver will decode; the difference stays in the residual: sent + kept = accumulated.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distrobust.compression import native
from distrobust.compression.indices import INDEX_CODES, IndexCode, elias_fano_plan
from distrobust.compression.values import FITTED_FROM, VALUE_CODES, ValueCode
from distrobust.errors import CodecError

__all__ = ["INDEX_CODES", "VALUE_CODES", "Code", "Space", "decode", "encode", "num_bytes"]


@dataclass(frozen=True)
class Code:
    """How indices and values are written."""

    values: ValueCode
    indices: IndexCode = INDEX_CODES["elias_fano"]


@dataclass(frozen=True)
class Space:
    """n coordinates, of which sum(counts) are sent: counts[i] of those from starts[i] up to starts[i + 1] (or n)."""

    n: int
    counts: tuple[int, ...]
    starts: tuple[int, ...] = (0,)

    @cached_property
    def k(self) -> int:
        return sum(self.counts)


def num_bytes(space: Space, code: Code) -> int:
    """Length in bytes of a payload."""
    return code.indices.num_bytes(space.n, space.k) + code.values.num_bytes(space.counts)


def encode(indices: Tensor, values: Tensor, space: Space, code: Code) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `indices` (k,) int64, strictly ascending, below n, and `values` (k,) float32.

    Returns the payload (num_bytes(space, code),) uint8, and the indices and values as a receiver decodes them: the
    index code may have left out a few of the smallest.
    """
    return encode_all([(indices, values, space)], code)[0]


def encode_all(parts: list[tuple[Tensor, Tensor, Space]], code: Code) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`encode` of several (indices, values, space), each by itself, in less time than one after the other."""
    leveled = code.values.leveled
    if (
        not parts
        or leveled is None
        or code.indices.name != "elias_fano"
        or not native.takes(*(t for p in parts for t in p[:2]))
    ):
        return [_encode(*part, code) for part in parts]
    for indices, values, space in parts:
        _check_blocks(space)
        if not indices.numel() == values.numel() == space.k:
            raise ValueError(f"{indices.numel()} indices and {values.numel()} values for a space of {space.k}")
    counts = [space.counts for _, _, space in parts]
    sizes = [size for one in counts for size in one]
    scales, tables, levels = leveled.fit(torch.cat([values for _, values, _ in parts]), sizes, sizes)
    numbers, wide, heads = torch.tensor(sizes, device="cpu"), scales.to(torch.float32), scales.view(torch.uint8)
    table_bytes, first, first_table = tables.view(-1).view(torch.uint8), 0, 0
    each_table = 2 * levels.shape[1]
    results = []
    for indices, values, space in parts:
        last = first + len(space.counts)
        last_table = first_table + each_table * len(leveled.fitted(space.counts))
        fitted = (
            wide[first:last],
            levels[first:last],
            heads[2 * first : 2 * last],
            table_bytes[first_table:last_table],
        )
        plan = elias_fano_plan(space.n, space.k)
        payload, sent = native.encode(indices, values, *plan, numbers[first:last], leveled.width, fitted)
        results.append((payload, indices, sent))
        first, first_table = last, last_table
    return results


def _encode(indices: Tensor, values: Tensor, space: Space, code: Code) -> tuple[Tensor, Tensor, Tensor]:
    kept = code.indices.keep(indices, values.abs(), space.n)
    if kept is not None:
        indices, values = indices[kept], values[kept]
    sizes = _sizes(indices, space)
    coded = code.values.encode(values, sizes, space.counts)
    padding = code.values.num_bytes(space.counts) - coded.numel()
    pieces = [code.indices.encode(indices, space.n, space.k), coded, coded.new_zeros(padding)]
    return torch.cat(pieces), indices, code.values.decode(coded, sizes, space.counts)


def decode(payload: Tensor, space: Space, code: Code) -> tuple[Tensor, Tensor]:
    """Indices (up to k,) int64, strictly ascending, below n, and values of as many float32;

    raises CodecError otherwise.
    """
    wanted = num_bytes(space, code)
    if payload.numel() != wanted:
        raise CodecError(
            f"payload of {payload.numel()} bytes, expected {wanted} for {space.k} of {space.n} coordinates"
        )
    leveled = code.values.leveled
    if leveled is not None and code.indices.name == "elias_fano" and native.takes(payload):
        _check_blocks(space)
        blocks = (torch.tensor(space.starts, device="cpu"), torch.tensor(space.counts, device="cpu"))
        plan = elias_fano_plan(space.n, space.k)
        found = native.decode(payload, space.n, space.k, *plan, blocks, leveled.width, FITTED_FROM, leveled.typical)
        if found is not None:
            return found
    split = code.indices.num_bytes(space.n, space.k)
    indices = code.indices.decode(payload[:split], space.n, space.k)
    sizes = _sizes(indices, space)
    if any(size > count for size, count in zip(sizes, space.counts, strict=True)):
        raise CodecError(f"blocks of {sizes} values, expected at most {list(space.counts)}")
    return indices, code.values.decode(payload[split:], sizes, space.counts)


def _check_blocks(space: Space) -> None:
    """C takes it on trust that every block has a start."""
    if len(space.counts) != len(space.starts):
        raise ValueError(f"a space of {len(space.counts)} blocks with {len(space.starts)} starts")


def _sizes(indices: Tensor, space: Space) -> list[int]:
    """How many of `indices` lie in each block."""
    if len(space.starts) == 1:
        return [indices.numel()]
    starts = torch.tensor(space.starts[1:], device=indices.device)
    inner: list[int] = torch.searchsorted(indices, starts).tolist()
    ends = [0, *inner, indices.numel()]
    return [b - a for a, b in itertools.pairwise(ends)]
