"""One rank's part of a split, as batches: the same number of them on every rank, or DDP would wait forever.

Ranks keep their rows from epoch to epoch, so that each decodes only what it owns. The order within an epoch
depends only on (seed, epoch, rank, world_size); neither the cache mode nor a resumption changes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from distrobust.data.order import Indices, assign_rows, cut_into_pieces, epoch_order
from distrobust.data.selection import Selection
from distrobust.data.source import Source
from distrobust.data.stream import RowStream
from distrobust.errors import ConfigError

CACHES = ("auto", "memory", "stream")
# Encoded bytes that are shuffled together, and held when streaming; as JPEG about 1 GiB of decoded images,
# all of CIFAR-10 three times over. The same in both modes, so that the mode does not change the order of
# the rows.
WINDOW_BYTES = 128 * 2**20
LOAD_ROWS = 1024  # decoded at a time while filling the memory cache


class Shard:
    """The rows of `source` that rank `rank` of `world_size` trains on or evaluates."""

    def __init__(
        self,
        source: Source,
        rank: int,
        world_size: int,
        seed: int,
        *,
        cache: str = "auto",
        memory_limit_bytes: int = 2 * 2**30,
        rows: Selection | None = None,
    ) -> None:
        """Finds the rank's rows. Memory mode also decodes them: a damaged image stops the run before step 0.

        Args:
            seed: >= 0, the same on all ranks.
            cache: "memory" decodes once and keeps uint8; "stream" decodes in every epoch, holding two
                windows of WINDOW_BYTES of encoded images (or two row groups, where those are larger);
                "auto" takes memory if this rank's decoded rows fit in `memory_limit_bytes`.
            rows: a part made by `split_held_out(source, ...)`; default: all rows.

        Raises ConfigError for an unknown cache mode, DataError for images that do not decode.
        """
        if cache not in CACHES:
            raise ConfigError(f"data cache is {cache!r}, wanted one of {', '.join(CACHES)}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below world_size {world_size}")
        if rows is not None and rows.total_rows != source.total_rows:
            raise ValueError(f"selection is of {rows.total_rows} rows, the source has {source.total_rows}")
        selected = np.arange(source.total_rows) if rows is None else rows.rows()
        self.selected: Indices = selected  #: of all ranks together, ascending
        group_starts = np.array([group.first_row for group in source.row_groups])
        self.source, self.rank, self.world_size, self.seed = source, rank, world_size, seed
        self.total_rows = len(selected)  #: of all ranks together
        #: (rows of this rank,) numbers of the rows in the source, ascending
        self.rows: Indices = assign_rows(selected, group_starts, rank, world_size, seed)
        self._pieces = cut_into_pieces(self.rows, group_starts)
        self._labels = torch.from_numpy(source.labels[self.rows])
        fits = len(self.rows) * source.row_bytes <= memory_limit_bytes
        self.in_memory = cache == "memory" or (cache == "auto" and fits)
        self._images = self._decode_all() if self.in_memory else None

    def num_steps(self, global_batch: int) -> int:
        """Full batches an epoch has, the same on every rank: floor(total rows / global_batch).

        global_batch: rows of all ranks together. Raises ConfigError unless it is a positive multiple of
        world_size and not more than there are rows.
        """
        if global_batch < 1 or global_batch % self.world_size:
            raise ConfigError(
                f"global batch size is {global_batch}, wanted a positive multiple of the number of workers, "
                f"{self.world_size}; try {max(1, round(global_batch / self.world_size)) * self.world_size}"
            )
        if global_batch > self.total_rows:
            raise ConfigError(
                f"global batch size is {global_batch}, but there are only {self.total_rows} rows; "
                f"wanted at most {self.total_rows // self.world_size * self.world_size}"
            )
        return self.total_rows // global_batch

    def batches(self, epoch: int, global_batch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from `start_step` on: num_steps(global_batch) - start_step of them.

        Yields (images, labels): uint8 (B, C, H, W), or (B, length) for text, and int64 (B,), B = global_batch /
        world_size, both the caller's to change. No row comes twice in an epoch; which rows are left over for want
        of a full batch differs from epoch to epoch. Raises as num_steps does, at once; DataError while iterating,
        when streaming meets a damaged image.
        """
        num_steps = self.num_steps(global_batch)
        if not 0 <= start_step <= num_steps:
            raise ValueError(f"start_step is {start_step}, wanted 0 .. {num_steps}")
        order = epoch_order(
            self._pieces,
            self._piece_bytes(),
            WINDOW_BYTES,
            seed=self.seed,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
        )
        batch = global_batch // self.world_size
        positions = order.positions[start_step * batch : num_steps * batch]
        return self._visit(positions, batch, order.window_of_piece)

    def in_order(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows of this rank once, as `self.rows` lists them, `batch` at a time; the last may be fewer.

        With one rank that is the order of the files. A rank may have one batch fewer than another, or none
        at all: no collective may depend on the number of batches.
        """
        if batch < 1:
            raise ValueError(f"batch is {batch}, wanted at least 1")
        each_its_window = np.arange(len(self._pieces.group))
        return self._visit(np.arange(len(self.rows)), batch, each_its_window)

    def _visit(self, positions: Indices, batch: int, window_of_piece: Indices) -> Iterator[tuple[Tensor, Tensor]]:
        stream = RowStream(self.source, self.rows, self._pieces, window_of_piece)
        for start in range(0, len(positions), batch):
            chosen = positions[start : start + batch]
            index = torch.from_numpy(chosen)
            if self._images is None:
                # through a flat view: numpy leaves strides on dimensions of one that torch takes for channels-last,
                # and convolutions then round differently than in memory mode
                images = torch.from_numpy(stream.fetch(chosen)).flatten().view(-1, *self.source.shape)
            else:
                images = self._images[index]
            yield images, self._labels[index]

    def _decode_all(self) -> Tensor:
        """(rows of the rank, ...) uint8. Besides it a few row groups and LOAD_ROWS images are held."""
        images = torch.empty((len(self.rows), *self.source.shape), dtype=torch.uint8)
        stream = RowStream(self.source, self.rows, self._pieces, np.arange(len(self._pieces.group)))
        for start in range(0, len(self.rows), LOAD_ROWS):
            stop = min(start + LOAD_ROWS, len(self.rows))
            images[start:stop] = torch.from_numpy(stream.fetch(np.arange(start, stop)))
        return images

    def _piece_bytes(self) -> Indices:
        """(P,) encoded bytes of each piece, from the metadata: its share of its row group."""
        groups = [self.source.row_groups[group] for group in self._pieces.group]
        share = np.diff(self._pieces.start) / np.array([group.num_rows for group in groups])
        encoded = np.array([group.encoded_bytes for group in groups])
        piece_bytes: Indices = np.ceil(share * encoded).astype(np.int64)
        return piece_bytes
