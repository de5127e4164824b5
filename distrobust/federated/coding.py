"""Updates <-> messages: the bytes that the communication hook would send for the same gradient.

The hook puts a bucket's large parameters where DDP has them and all small ones, fused, behind the bucket's end; here
the bucket is the whole model in the order of its parameters, as DDP has it for a small model before it rebuilds its
buckets. Accumulation, selection, coding and what stays are the functions of distrobust.compression that the hook
calls, for a cohort at a time. The round stands where the hook has its step. tests/federated/test_hook.py holds the two
against each other.

Sparse ternary compression (Sattler et al., 2019): values `sign`, indices `rice` (Golomb's code) and a `fuse_below`
above the largest tensor's size, so that there is one magnitude, and one selection, for the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrobust.compression import codec, memory, message
from distrobust.compression.accumulate import Piece, select_piece
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES, Code, Space
from distrobust.compression.memory import Residual, Rule
from distrobust.compression.message import Layout
from distrobust.compression.select import num_selected
from distrobust.federated.network import is_finite
from distrobust.federated.settings import CodingConfig


@dataclass(frozen=True)
class Coded:
    """A message (bytes,) uint8 and what receivers read in it: `places` (k,) int64 in the vector, `values` (k,)."""

    message: Tensor
    places: Tensor
    values: Tensor


class Coder:
    """For vectors of parameters of these sizes, end to end."""

    def __init__(self, sizes: Sequence[int], settings: CodingConfig) -> None:
        self.settings = settings
        self.n = sum(sizes)
        self.num_parameters = len(sizes)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        blocks = list(zip(starts, sizes, strict=True))
        self._large = [(start, size) for start, size in blocks if size >= settings.fuse_below]
        small = [torch.arange(start, start + size) for start, size in blocks if size < settings.fuse_below]
        self._small = torch.cat(small) if small else torch.zeros(0, dtype=torch.int64)
        units = [*self._large, *([(self.n, self._small.numel())] if small else [])]
        counts = tuple(num_selected(size, settings.density) for _, size in units)
        self._pieces = [Piece(0, size, k) for (_, size), k in zip(units, counts, strict=True)]
        self._space = Space(self.n + self._small.numel(), counts, tuple(start for start, _ in units))
        self._code = Code(VALUE_CODES[settings.values], INDEX_CODES[settings.indices])
        self._header = message.header(torch.ones(len(sizes), dtype=torch.bool), torch.zeros(0))

    def layout(self, round_number: int) -> Layout:
        return Layout(self._space, self._code, self.num_parameters, step=round_number)

    @property
    def num_bytes(self) -> int:
        """Of any message."""
        return self.layout(0).num_bytes

    def encode(self, sums: Tensor, round_number: int) -> list[Coded]:
        """sums (C, n) float32, finite: one message each, of the largest coordinates of every unit."""
        selected = [(*self._selected(row), self._space) for row in sums]
        layout = self.layout(round_number)
        return [
            Coded(message.pack(layout, self._header, payload), self._in_vector(places), values)
            for payload, places, values in codec.encode_all(selected, self._code)
        ]

    def decode(self, received: Tensor, round_number: int) -> tuple[Tensor, Tensor]:
        """`places` and `values` of a message; CodecError if it is damaged."""
        decoded = message.unpack(self.layout(round_number), received)
        return self._in_vector(decoded.indices), decoded.values

    def _selected(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Places on the line and values of what is selected in one vector (n,)."""
        within = [row[start : start + size] for start, size in self._large]
        within += [row[self._small]] if self._small.numel() else []
        found = [
            select_piece(unit, piece, self.settings.selector) for unit, piece in zip(within, self._pieces, strict=True)
        ]
        places = [one.indices + start for one, start in zip(found, self._space.starts, strict=True)]
        return torch.cat(places), torch.cat([one.values for one in found])

    def _in_vector(self, places: Tensor) -> Tensor:
        inside = int(torch.searchsorted(places, self.n))
        return torch.cat([places[:inside], self._small[places[inside:] - self.n]])


@dataclass(frozen=True)
class Compressed:
    """coded: one a client, None where its sum was not finite. v, u (C, n): what it keeps if the message arrives."""

    coded: list[Coded | None]
    v: Tensor
    u: Tensor | None


def compress(coder: Coder, rule: Rule, updates: Tensor, v: Tensor, u: Tensor | None, round_number: int) -> Compressed:
    """Accumulates updates (C, n) into residuals v and velocities u (C, n; None without momentum), and codes.

    v and u are left as they are: keeping them is the roll-back.
    """
    memory_of_all = Residual(0, rule, updates.device)
    memory_of_all.v, memory_of_all.next_v = v.view(-1), torch.empty_like(updates).view(-1)
    if u is not None:
        memory_of_all.u, memory_of_all.next_u = u.view(-1), torch.empty_like(updates).view(-1)
    memory.accumulate(memory_of_all, updates.view(-1))
    sums = memory_of_all.next_v.view_as(updates)
    finite = is_finite(sums).nonzero().view(-1)
    coded: list[Coded | None] = [None] * len(updates)
    made = coder.encode(sums[finite], round_number)
    for client, one in zip(finite.tolist(), made, strict=True):
        coded[client] = one
    if made:
        places = torch.cat([one.places + client * coder.n for client, one in zip(finite.tolist(), made, strict=True)])
        memory.remove_sent(memory_of_all, places, torch.cat([one.values for one in made]))
    return Compressed(coded, sums, memory_of_all.next_u.view_as(updates) if u is not None else None)
