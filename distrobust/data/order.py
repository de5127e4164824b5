"""Which rank has which rows, and in which order an epoch visits them. Index arithmetic: no file is touched.

**Assignment.** The seed shuffles the row groups, which gives the rows an order; rank r of N has the r-th of
N equal contiguous ranges of it. So ranks differ by at most one row, a rank shares at most two row groups
with others, and with fewer row groups than ranks a row group is simply cut.

**Epoch order.** A rank's part of one row group is a *piece*. Each epoch shuffles the pieces, fills
*windows* with them up to a number of encoded bytes, and shuffles the rows within each window. Whoever walks
along that order needs the pieces of at most a few windows at a time (of two, if a batch is smaller than a
window), and whoever starts in the middle needs nothing of what lies before. A data set that is sorted by
class and larger than a window is therefore shuffled less well than one written in random order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

ASSIGN_STREAM, EPOCH_STREAM = 2, 3  # keep the random numbers of the two apart under the same seed


@dataclass(frozen=True)
class Pieces:
    """A rank's rows cut at the borders of row groups. Positions count the rank's rows, 0 .. len(rows)-1."""

    group: Indices  #: (P,) index of the row group
    start: Indices  #: (P + 1,) piece p has the positions start[p] .. start[p+1]-1


@dataclass(frozen=True)
class EpochOrder:
    positions: Indices  #: (rows of the rank,) each position once
    window_of_piece: Indices  #: (P,) windows are numbered in the order they are visited


def assign_rows(rows: Indices, group_starts: Indices, rank: int, world_size: int, seed: int) -> Indices:
    """The rows of `rank`, ascending.

    Args:
        rows: (T,) all selected rows of the split, ascending.
        group_starts: (G,) first row of each row group, ascending, the first is 0.
    """
    shuffled = np.random.default_rng([seed, ASSIGN_STREAM]).permutation(len(group_starts))
    place_of_group = np.empty_like(shuffled)
    place_of_group[shuffled] = np.arange(len(shuffled))
    group_of_row = np.searchsorted(group_starts, rows, side="right") - 1
    in_order = rows[np.argsort(place_of_group[group_of_row], kind="stable")]
    start, stop = len(rows) * rank // world_size, len(rows) * (rank + 1) // world_size
    return np.sort(in_order[start:stop])


def cut_into_pieces(rows: Indices, group_starts: Indices) -> Pieces:
    """Cuts a rank's ascending rows at the row groups they lie in; row groups without rows make no piece."""
    group_of_row = np.searchsorted(group_starts, rows, side="right") - 1
    groups, start = np.unique(group_of_row, return_index=True)
    return Pieces(groups, np.append(start, len(rows)))


def epoch_order(
    pieces: Pieces,
    piece_bytes: Indices,
    window_bytes: int,
    *,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
) -> EpochOrder:
    """The order one rank visits its rows in; depends on nothing but the arguments.

    piece_bytes: (P,) encoded bytes of each piece. A window takes pieces until the next would exceed
    `window_bytes`, and at least one.
    """
    rng = np.random.default_rng([seed, EPOCH_STREAM, epoch, rank, world_size])
    window_of_piece = np.zeros(len(pieces.group), dtype=np.int64)
    windows: list[list[Indices]] = []
    held = 0
    for piece in rng.permutation(len(pieces.group)):
        if not windows or held + piece_bytes[piece] > window_bytes:
            windows.append([])
            held = 0
        held += int(piece_bytes[piece])
        windows[-1].append(np.arange(pieces.start[piece], pieces.start[piece + 1]))
        window_of_piece[piece] = len(windows) - 1
    shuffled = [rng.permutation(np.concatenate(window)) for window in windows]
    positions = np.concatenate(shuffled) if shuffled else np.empty(0, dtype=np.int64)
    return EpochOrder(positions, window_of_piece)
