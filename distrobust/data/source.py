"""What is known about one split of a data set before its images or texts are decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowGroup:
    """The smallest part of a Parquet file that can be read alone."""

    file: int  #: index into Source.files
    index: int  #: within its file
    first_row: int  #: counted over all files of the split
    num_rows: int  #: at least 1
    encoded_bytes: int  #: of its images as PNG, JPEG, ... or its texts, before Parquet's own compression


@dataclass(frozen=True)
class Source:
    """One split of a data set. Rows are counted from 0 through all files in order."""

    files: tuple[Path, ...]
    row_groups: tuple[RowGroup, ...] = field(repr=False)  #: ascending in first_row
    column: str  #: of the images or texts
    label_column: str
    class_names: tuple[str, ...]
    shape: tuple[int, ...]  #: of a row: (C, H, W) of images, C is 1 for gray, 3 for RGB; (length,) of texts, in bytes
    labels: NDArray[np.int64] = field(repr=False, compare=False)  #: (total_rows,), each in 0 .. num_classes - 1

    @property
    def total_rows(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def is_text(self) -> bool:
        return len(self.shape) == 1

    @property
    def parquet_column(self) -> str:
        """The column of plain values, as Parquet names it."""
        return self.column if self.is_text else f"{self.column}.bytes"

    @property
    def row_bytes(self) -> int:
        """Bytes of one decoded row."""
        return math.prod(self.shape)

    def where(self, row: int) -> str:
        """File, column and row within that file, for messages."""
        group = next(group for group in reversed(self.row_groups) if group.first_row <= row)
        file_start = next(other.first_row for other in self.row_groups if other.file == group.file)
        return f"{self.files[group.file]}, column {self.column!r}, row {row - file_start}"
