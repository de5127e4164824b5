"""What is known about one split of a data set before its images are decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrobust.data.decoding import Shape


@dataclass(frozen=True)
class RowGroup:
    """The smallest part of a Parquet file that can be read alone."""

    file: int  #: index into Source.files
    index: int  #: within its file
    first_row: int  #: counted over all files of the split
    num_rows: int  #: at least 1
    encoded_bytes: int  #: of its images as PNG, JPEG, ..., before Parquet's own compression


@dataclass(frozen=True)
class Source:
    """One split of a data set. Rows are counted from 0 through all files in order."""

    files: tuple[Path, ...]
    row_groups: tuple[RowGroup, ...] = field(repr=False)  #: ascending in first_row
    image_column: str
    label_column: str
    class_names: tuple[str, ...]
    shape: Shape  #: (C, H, W) of every image; C is 1 for gray, 3 for RGB
    labels: NDArray[np.int64] = field(repr=False, compare=False)  #: (total_rows,), each in 0 .. num_classes - 1

    @property
    def total_rows(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_bytes(self) -> int:
        """Bytes of one decoded image."""
        channels, height, width = self.shape
        return channels * height * width

    def where(self, row: int) -> str:
        """File, image column and row within that file, for messages."""
        group = next(group for group in reversed(self.row_groups) if group.first_row <= row)
        file_start = next(other.first_row for other in self.row_groups if other.file == group.file)
        return f"{self.files[group.file]}, column {self.image_column!r}, row {row - file_start}"
