"""The label column: read whole and checked to the last row, as it is small and a wrong label is fatal late.

On a GPU a label outside the classes kills the process by a device-side assertion in the first epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distrobust.data.encoded import unreadable
from distrobust.errors import DataError

MAX_UNNAMED_CLASSES = 100_000  # a larger label is an identifier or a mistake; ImageNet-21k has 21,841 classes


@dataclass(frozen=True)
class LabelColumn:
    """Labels of all files of a split, in order."""

    files: tuple[Path, ...]
    name: str
    values: NDArray[np.int64]  #: (rows of all files,)
    file_starts: tuple[int, ...]  #: the row each file begins at

    def where(self, row: int) -> str:
        """File, column and row within that file, for messages."""
        file = int(np.searchsorted(self.file_starts, row, side="right")) - 1
        return f"{self.files[file]}, column {self.name!r}, row {row - self.file_starts[file]}"


def read_labels(files: Sequence[Path], name: str) -> LabelColumn:
    """Reads an integer column. DataError for a null, for a value beyond int64, for an unreadable file."""
    return _labels(files, name, lambda column: column.cast(pa.int64()).to_numpy())


def read_named_labels(
    files: Sequence[Path], name: str, classes: Sequence[str] | None
) -> tuple[LabelColumn, tuple[str, ...]]:
    """Reads a column of strings: (their numbers among the classes, the classes).

    classes: their names; default: the strings there are, sorted. DataError for a null, a string that is none of
    `classes`, more different strings than classes are likely to be, an unreadable file.
    """
    numbers: dict[str, int] = {}  # of every different string, as they come

    def numbered(column: pa.ChunkedArray) -> NDArray[np.int64]:
        coded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
        for word in coded.dictionary.to_pylist():
            numbers.setdefault(word, len(numbers))
        of_file: NDArray[np.int64] = np.array([numbers[word] for word in coded.dictionary.to_pylist()], dtype=np.int64)
        return np.asarray(of_file[coded.indices.to_numpy()])

    labels = _labels(files, name, numbered)
    words = list(numbers)
    names = tuple(sorted(words) if classes is None else classes)
    if len(names) > MAX_UNNAMED_CLASSES:
        raise DataError(
            f"{files[0]}, column {name!r}: {len(words)} different strings do not look like classes; "
            "choose another label_column"
        )
    place = {word: number for number, word in enumerate(names)}
    for word in words:
        if word not in place:
            row = int(np.argmax(labels.values == numbers[word]))
            raise DataError(
                f"{labels.where(row)}: label {word!r} is none of the {len(names)} classes ({', '.join(names[:3])}, "
                "...); wanted the classes of the training split: correct or remove the row"
            )
    order = np.array([place[word] for word in words], dtype=np.int64)
    return dataclasses.replace(labels, values=order[labels.values]), names


def _labels(
    files: Sequence[Path], name: str, to_numbers: Callable[[pa.ChunkedArray], NDArray[np.int64]]
) -> LabelColumn:
    parts: list[NDArray[np.int64]] = []
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                column = parquet.read(columns=[name]).column(0)
            if column.null_count:
                row = int(np.argmax(column.is_null().to_numpy()))
                raise DataError(
                    f"{file}, column {name!r}, row {row}: label is null, wanted an integer or a string; remove the row"
                )
            parts.append(to_numbers(column))
        except (OSError, pa.ArrowException) as error:
            raise unreadable(f"{file}, column {name!r}", error) from error
    starts = np.cumsum([0, *(len(part) for part in parts)])
    return LabelColumn(tuple(files), name, np.concatenate(parts), tuple(int(start) for start in starts[:-1]))


def numbered_classes(labels: LabelColumn) -> tuple[str, ...]:
    """("0", ..., "max label") for files that do not name their classes."""
    row = int(np.argmax(labels.values))
    label = int(labels.values[row])
    if label >= MAX_UNNAMED_CLASSES:
        raise DataError(
            f"{labels.where(row)}: label {label}, but the file names no classes, and more than "
            f"{MAX_UNNAMED_CLASSES} unnamed ones look like a mistake; wanted 0 .. number of classes - 1; "
            "choose another label_column"
        )
    return tuple(str(i) for i in range(label + 1))


def check_range(labels: LabelColumn, num_classes: int) -> None:
    """DataError naming the first row whose label is not in 0 .. num_classes - 1."""
    outside = (labels.values < 0) | (labels.values >= num_classes)
    if not outside.any():
        return
    row = int(np.argmax(outside))
    wanted = f"wanted 0 .. {num_classes - 1}" if num_classes else "and every label is negative"
    hint = "; -1 usually marks a split published without labels" if labels.values[row] == -1 else ""
    raise DataError(
        f"{labels.where(row)}: label {labels.values[row]} is outside the {num_classes} classes, {wanted} "
        f"({int(outside.sum())} such rows){hint}"
    )
