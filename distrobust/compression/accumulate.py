"""One pass over a parameter: accumulate the gradient into the residual and find the coordinates that leave.

On a CPU the pass goes block by block through the second-level cache: u, v, g (and w) are read and u, v written once,
and magnitudes and comparisons never reach memory. numpy rather than torch, whose calls cost more on blocks of this
size; where there is a C compiler, native.py does the same in less time (record benchmarks/results/local_part.json).

The threshold is a guess: a little below that of the last step, or below where it is falling to. Too low costs time, too
high is noticed (fewer than k candidates) and the selector does the work; the result is the same k largest always.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distrobust.compression import memory, native, select
from distrobust.compression.memory import Residual

BLOCK = 1 << 17  # elements: four arrays of half a MiB
MARGIN = 0.9  # of the last threshold
FEW = 16  # candidates per coordinate wanted, beyond which the guess was too low to be of use


@dataclass(frozen=True)
class Piece:
    """Coordinates `start` to `stop` of one parameter, of which `k` are sent."""

    start: int
    stop: int
    k: int


def accumulate_and_select(
    residual: Residual, gradient: Tensor, weight: Tensor, factor: Tensor | float, pieces: list[Piece], selector: str
) -> list[Tensor] | None:
    """Writes next_u and next_v for `factor` * gradient (n,), with weight decay, and selects in every piece.

    Returns ascending indices (k,) int64 within the parameter for each piece; None if a value is not finite.
    """
    if gradient.device.type != "cpu":
        memory.accumulate(residual, memory.decayed(gradient, weight, residual.rule, factor))
        if not bool(torch.isfinite(residual.next_v.sum())):
            return None
        return [_select(residual, piece, selector) for piece in pieces]
    num = sum(piece.k for piece in pieces)
    threshold = residual.threshold * min(1.0, residual.growth) * MARGIN if selector == "sampled" else 0.0
    room = FEW * max(64, num)
    one_pass = native.accumulate if native.fits(residual, gradient, weight) else blocked_pass
    found = one_pass(residual, gradient, weight, float(factor), threshold, room)
    values = residual.next_v.numpy()
    if found is None:
        if not np.isfinite(np.abs(values).max()):
            return None
        candidates, magnitudes = np.empty(0, np.int64), np.empty(0, np.float32)
    else:
        candidates, magnitudes = found[0], np.abs(found[1])
        if not np.isfinite(magnitudes).all():
            return None
    chosen, least = [], math.inf
    bounds = np.searchsorted(candidates, [[piece.start, piece.stop] for piece in pieces])
    for piece, (low, high) in zip(pieces, bounds, strict=True):
        if high - low < piece.k:  # the guess was too high, or there was none
            chosen.append(_select(residual, piece, selector))
            smallest = np.abs(values[chosen[-1].numpy()]).min()
        else:
            among = select.exact(magnitudes[low:high], piece.k)
            chosen.append(torch.from_numpy(candidates[low:high][among]))
            smallest = magnitudes[low:high][among].min()
        least = min(least, float(smallest))
    least = least if chosen else 0.0
    residual.growth = least / residual.threshold if residual.threshold else 1.0
    residual.threshold = least
    return chosen


def _select(residual: Residual, piece: Piece, selector: str) -> Tensor:
    return select.SELECTORS[selector](residual.next_v[piece.start : piece.stop], piece.k) + piece.start


def blocked_pass(
    residual: Residual, gradient: Tensor, weight: Tensor, factor: float, threshold: float, room: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None:
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
    return places, next_v[places]
