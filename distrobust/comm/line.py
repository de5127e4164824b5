"""The coordinates of one bucket on one line: its large parameters where DDP put them, all small ones at the end.

An index in a message is a place on the line. Small parameters (biases, norms) compete with each other in one joint
selection; they ride in the last bucket, when all of them have been accumulated, so that what is sent does not depend on
how parameters fall into buckets.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distrobust.compression import memory
from distrobust.compression.accumulate import Piece, Selected
from distrobust.compression.codec import Space
from distrobust.compression.memory import Residual, Rule
from distrobust.compression.select import num_selected


@dataclass(frozen=True)
class Part:
    """One parameter within a bucket: `gradient` and `weight` (n,) are flat, in the order of the parameter's storage."""

    name: str
    start: int  # first coordinate in the bucket
    gradient: Tensor
    weight: Tensor
    residual: Residual

    @property
    def end(self) -> int:
        return self.start + self.gradient.numel()


class Joined:
    """Copies of the next buffers of several residuals, end to end; `write_back` returns what became of them."""

    def __init__(self, residuals: list[Residual]) -> None:
        self.residuals = residuals
        # velocities are masked if any has one; those without are zero here
        self.rule: Rule = next((r.rule for r in residuals if r.rule.momentum), residuals[0].rule)
        self.next_v = torch.cat([r.next_v for r in residuals])
        self.next_u = torch.cat([r.next_u if r.rule.momentum else torch.zeros_like(r.next_v) for r in residuals])
        self.sizes = [r.v.numel() for r in residuals]

    def write_back(self) -> None:
        pieces = zip(self.residuals, self.next_v.split(self.sizes), self.next_u.split(self.sizes), strict=True)
        for residual, v, u in pieces:
            residual.next_v.copy_(v)
            if residual.rule.momentum:
                residual.next_u.copy_(u)


@dataclass(frozen=True)
class Unit:
    """A stretch of the line whose coordinates compete with each other. `part` is None for the small parameters."""

    start: int
    n: int
    memory: Residual | Joined
    part: Part | None


@dataclass(frozen=True)
class Cut:
    """What lies between two places of the line: pieces of units, each with its own number of coordinates to send."""

    start: int
    stop: int
    pieces: tuple[tuple[Unit, Piece], ...]

    @cached_property
    def space(self) -> Space:
        """Indices count from the cut's start; every piece is a block of values with a scale of its own."""
        starts = tuple(unit.start + piece.start - self.start for unit, piece in self.pieces)
        return Space(self.stop - self.start, tuple(piece.k for _, piece in self.pieces), starts)


def units_of(parts: list[Part], bucket_size: int, fused: Joined | None) -> list[Unit]:
    """The units of a line, ascending. `parts`: the large parameters of the bucket."""
    units = [Unit(p.start, p.gradient.numel(), p.residual, p) for p in sorted(parts, key=lambda p: p.start)]
    if fused is not None:
        units.append(Unit(bucket_size, fused.next_v.numel(), fused, None))
    return units


def cut(units: list[Unit], size: int, num_cuts: int, density: float) -> list[Cut]:
    """The line of `size` places in `num_cuts` equal stretches."""
    bounds = [size * i // num_cuts for i in range(num_cuts + 1)]
    cuts = []
    for start, stop in itertools.pairwise(bounds):
        pieces = []
        for unit in units:
            low, high = max(start, unit.start), min(stop, unit.start + unit.n)
            if low < high:
                k = num_selected(high - low, density)
                pieces.append((unit, Piece(low - unit.start, high - unit.start, k)))
        cuts.append(Cut(start, stop, tuple(pieces)))
    return cuts


def join(chosen: Cut, selected: list[Selected]) -> tuple[Tensor, Tensor]:
    """Places (k,) int64, counted from the cut's start, and values (k,), of what was selected in each piece's unit."""
    places = [s.indices + (unit.start - chosen.start) for (unit, _), s in zip(chosen.pieces, selected, strict=True)]
    return torch.cat(places), torch.cat([s.values for s in selected])


def remove_sent(chosen: Cut, places: Tensor, sent: Tensor) -> None:
    """Takes what receivers decode out of the residuals it came from."""
    for unit, _, mine in _by_piece(chosen, places):
        memory.remove_sent(unit.memory, places[mine], sent[mine], unit.start - chosen.start)
    _write_back(chosen)


def add(chosen: Cut, places: Tensor, values: Tensor) -> None:
    """Adds received values (k,) to the residuals at their places; `_write_back` follows with `remove_sent`."""
    for unit, _, mine in _by_piece(chosen, places):
        unit.memory.next_v.index_add_(0, places[mine] - (unit.start - chosen.start), values[mine])


def _by_piece(chosen: Cut, places: Tensor) -> list[tuple[Unit, Piece, slice]]:
    """For each piece that has some: which of the ascending `places` are its own."""
    if len(chosen.pieces) == 1:
        return [(*chosen.pieces[0], slice(0, places.numel()))]
    starts = torch.tensor(chosen.space.starts[1:], device=places.device)
    ends = [0, *torch.searchsorted(places, starts).tolist(), places.numel()]
    return [
        (unit, piece, slice(low, high))
        for (unit, piece), (low, high) in zip(chosen.pieces, itertools.pairwise(ends), strict=True)
        if low < high
    ]


def _write_back(chosen: Cut) -> None:
    for unit, _ in chosen.pieces:
        if isinstance(unit.memory, Joined):
            unit.memory.write_back()
