"""Rows on demand: encoded images of a few row groups are held, and each is decoded when its batch is due.

Holding images encoded rather than decoded lets the same memory hold about ten times as many rows to shuffle
among, spreads the decoding evenly over the steps, and decodes none of the rows that a resumed epoch skips.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distrobust.data.decoding import decode
from distrobust.data.encoded import read_encoded
from distrobust.data.order import Indices, Pieces
from distrobust.data.source import Source
from distrobust.data.tokens import to_tokens


class RowStream:
    """Decodes a rank's rows by position; pieces are read when first needed and dropped with their window."""

    def __init__(self, source: Source, rows: Indices, pieces: Pieces, window_of_piece: Indices) -> None:
        """rows: (n,) the rank's rows; window_of_piece: (P,) the windows, which fetch() visits in order."""
        self._source, self._rows, self._pieces, self._window_of_piece = source, rows, pieces, window_of_piece
        self._held: dict[int, list[bytes | None]] = {}

    def fetch(self, positions: Indices) -> NDArray[np.uint8]:
        """(len(positions), *source.shape) uint8. DataError if a file cannot be read or a row does not decode."""
        piece_of = np.searchsorted(self._pieces.start, positions, side="right") - 1
        self._hold([int(piece) for piece in np.unique(piece_of)])
        offsets = positions - self._pieces.start[piece_of]
        encoded = [self._held[p][i] for p, i in zip(piece_of.tolist(), offsets.tolist(), strict=True)]

        def where(i: int) -> str:
            return self._source.where(int(self._rows[positions[i]]))

        if self._source.is_text:
            return to_tokens(encoded, self._source.shape[0], where)
        channels, height, width = self._source.shape
        return decode(encoded, (channels, height, width), where)

    def _hold(self, needed: list[int]) -> None:
        oldest = min(self._window_of_piece[piece] for piece in needed)
        self._held = {piece: data for piece, data in self._held.items() if self._window_of_piece[piece] >= oldest}
        for piece in needed:
            if piece not in self._held:
                self._held[piece] = self._read(piece)

    def _read(self, piece: int) -> list[bytes | None]:
        group = self._source.row_groups[self._pieces.group[piece]]
        inside = self._rows[self._pieces.start[piece] : self._pieces.start[piece + 1]] - group.first_row
        # Python bytes, because taking them one by one out of an Arrow array costs 25 us an image, half a
        # decode; take() first, so that a small piece does not keep its whole row group in memory
        images: list[bytes | None] = read_encoded(self._source, group).take(pa.array(inside)).to_pylist()
        return images
