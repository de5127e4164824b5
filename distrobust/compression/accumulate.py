"""One pass over a parameter: accumulate the gradient into the residual and find the coordinates that leave.

On a CPU the pass goes block by block through the second-level cache: u, v, g (and w) are read and u, v written once,
and magnitudes and comparisons never reach memory. numpy rather than torch, whose calls cost more on blocks of this
size; where there is a C compiler, native/ does the same in less time (record benchmarks/results/local_part.json).

The threshold is a guess: a little below where that of the last step is going. Too low costs time, too
high is noticed (fewer than k candidates) and the selector does the work; the result is the same k largest always.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distrobust.compression import memory, native, select
from distrobust.compression.memory import Residual

BLOCK = 1 << 17  # elements: four arrays of half a MiB
MARGIN = 0.9  # of the last threshold, as it has been growing or falling
MOST = 1.08  # growth that is expected to go on: with the margin, below the last threshold still
SMALL = 1 << 16  # elements, of which the k largest are found by counting, without looking for candidates first
FEW = 16  # candidates per coordinate wanted, beyond which the guess was too low to be of use


@dataclass(frozen=True)
class Piece:
    """Coordinates `start` to `stop` of one parameter, of which `k` are sent."""

    start: int
    stop: int
    k: int


@dataclass(frozen=True)
class Selected:
    """Ascending `indices` (k,) int64 within the parameter, and next_v there, `values` (k,) float32."""

    indices: Tensor
    values: Tensor


def accumulate_and_select(
    residual: Residual, gradient: Tensor, weight: Tensor, factor: Tensor | float, pieces: list[Piece], selector: str
) -> list[Selected] | None:
    """Writes next_u and next_v for `factor` * gradient (n,), with weight decay, and selects in every piece.

    None if a value is not finite.
    """
    if gradient.device.type != "cpu":
        memory.accumulate(residual, memory.decayed(gradient, weight, residual.rule, factor))
        if not bool(torch.isfinite(residual.next_v.sum())):
            return None
        return [select_piece(residual.next_v, piece, selector) for piece in pieces]
    num = sum(piece.k for piece in pieces)
    threshold = residual.threshold * min(MOST, residual.growth) * MARGIN if selector == "sampled" else 0.0
    room = FEW * max(64, num)
    compiled = native.takes_pass(residual, gradient, weight)
    one_pass, largest = (native.accumulate, native.select) if compiled else (blocked_pass, _largest)
    found = one_pass(residual, gradient, weight, float(factor), threshold, room)
    places, sums = (residual.v.new_empty(0, dtype=torch.int64), residual.v.new_empty(0)) if found is None else found
    if not np.isfinite((residual.next_v if found is None else sums).numpy()).all():
        return None
    chosen, least = [], math.inf
    for piece, (low, high) in zip(pieces, _bounds(places, pieces, residual.v.numel()), strict=True):
        if high - low < piece.k:  # the guess was too high, or there was none
            chosen.append(select_piece(residual.next_v, piece, selector))
            smallest = float(chosen[-1].values.abs().min())
        else:
            indices, picked, smallest = largest(places[low:high], sums[low:high], piece.k)
            chosen.append(Selected(indices, picked))
        least = min(least, smallest)
    least = least if chosen else 0.0
    residual.growth = least / residual.threshold if residual.threshold else 1.0
    residual.threshold = least
    return chosen


def _bounds(places: Tensor, pieces: list[Piece], n: int) -> list[list[int]]:
    """From where to where in the ascending `places` each piece's lie."""
    if [(piece.start, piece.stop) for piece in pieces] == [(0, n)]:
        return [[0, places.numel()]]
    wanted = torch.tensor([[piece.start, piece.stop] for piece in pieces], dtype=places.dtype)
    bounds: list[list[int]] = torch.searchsorted(places, wanted).tolist()
    return bounds


def _largest(places: Tensor, sums: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """Of the candidates: places and values of the k largest, and the smallest magnitude of those."""
    chosen = torch.from_numpy(select.exact(np.abs(sums.numpy()), k))
    values = sums[chosen]
    return places[chosen], values, float(values.abs().min())


def select_piece(next_v: Tensor, piece: Piece, selector: str) -> Selected:
    """The k largest of next_v[piece.start : piece.stop]."""
    within = next_v[piece.start : piece.stop]
    if within.numel() <= SMALL and native.takes(within):
        indices, values, _ = native.select(_places()[: within.numel()], within, piece.k)
        return Selected(indices.add_(piece.start), values)
    indices = select.SELECTORS[selector](within, piece.k) + piece.start
    return Selected(indices, next_v.index_select(0, indices))


@functools.cache
def _places() -> Tensor:
    """0 to SMALL"""
    return torch.arange(SMALL, dtype=torch.int32, device="cpu")


def blocked_pass(
    residual: Residual, gradient: Tensor, weight: Tensor, factor: float, threshold: float, room: int
) -> tuple[Tensor, Tensor] | None:
    """Ascending indices of all |next_v| >= threshold or not finite, and next_v there.

    None without a threshold, or if there are `room` or more.
    """
    rule = residual.rule
    n = residual.v.numel()
    v, next_v, u, next_u = (t.numpy() for t in (residual.v, residual.next_v, residual.u, residual.next_u))
    g, w = gradient.to(torch.float32).numpy(), weight.to(torch.float32).numpy()
    size = min(n, BLOCK)
    scratch, magnitude = np.empty(size, np.float32), np.empty(size, np.float32)
    below = np.empty(size, np.bool_)
    found: list[npt.NDArray[np.int64]] = []
    momentum, decay = np.float32(rule.momentum), np.float32(rule.weight_decay)
    with np.errstate(all="ignore"):  # what is not finite is found below
        for start in range(0, n, BLOCK):
            block = slice(start, min(n, start + BLOCK))
            m = block.stop - start
            step = g[block]
            if rule.weight_decay:
                decayed = np.multiply(w[block], decay, out=scratch[:m])
                decayed += step if factor == 1.0 else step * np.float32(factor)
                step = decayed
            elif factor != 1.0:
                step = np.multiply(step, np.float32(factor), out=scratch[:m])
            if rule.momentum:
                velocity = np.multiply(u[block], momentum, out=next_u[block])
                velocity += step
                step = velocity * momentum + step if rule.nesterov else velocity
            np.add(v[block], step, out=next_v[block])
            if room > 0 and threshold > 0.0:
                np.abs(next_v[block], out=magnitude[:m])
                np.less(magnitude[:m], threshold, out=below[:m])
                np.logical_not(below[:m], out=below[:m])  # so that NaN is found too
                hits = np.flatnonzero(below[:m])
                found.append(hits + start)
                room -= len(hits)
    if room <= 0 or threshold <= 0.0:
        return None
    places = np.concatenate(found)
    return torch.from_numpy(places), torch.from_numpy(next_v[places])
