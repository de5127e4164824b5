"""Describe a data set in Parquet: where its rows are, what they mean, and what is wrong, if cheap to find.

`describe` reads the metadata, the label column and one image. Other images, and texts, are checked when decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distrobust.data.columns import choose_column, choose_label_column, class_names, holds_strings
from distrobust.data.decoding import Shape, decode_one
from distrobust.data.encoded import read_encoded, read_first
from distrobust.data.labels import check_range, numbered_classes, read_labels, read_named_labels
from distrobust.data.layout import find_files
from distrobust.data.source import RowGroup, Source
from distrobust.data.tokens import LENGTH, NULL_TEXT
from distrobust.errors import DataError


def describe(
    path: str | Path,
    split: str,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    channels: int | None = None,
    length: int = LENGTH,
    classes: Sequence[str] | None = None,
) -> Source:
    """Describes the split `split` ("train", "test", ...) of the data set in the directory `path`.

    Args:
        image_column, text_column, label_column: override the choice made in columns.py.
        channels: 1 or 3; default: what the first image has. Pass 3 for RGB images with gray ones among them.
        length: of texts, in bytes: longer ones are cut.
        classes: class names the split must agree with. Pass `train.class_names` for the test split: without
            metadata, and without a row of the last class, it then still has the classes of the training
            split.

    Raises DataError, one line, for whatever does not fit.
    """
    if channels not in (None, 1, 3):
        raise DataError(f"channels is {channels}, wanted 1 (gray), 3 (RGB) or nothing (as the first image)")
    files = find_files(path, split)
    schemas = {file: _schema(file) for file in files}
    column, is_text = choose_column(schemas[files[0]], files[0], image_column, text_column)
    label = choose_label_column(schemas[files[0]], files[0], label_column)
    for file, schema in schemas.items():
        choose_column(schema, file, None if is_text else column, column if is_text else None)
        choose_label_column(schema, file, label)
    names = _agreed_names(schemas, label, classes)
    row_groups = _row_groups(files, column if is_text else f"{column}.bytes")
    if not row_groups:
        kind = "text" if is_text else "image"
        raise DataError(f"{files[0]} has no rows, wanted at least one {kind}; write the split again")
    if holds_strings(schemas[files[0]].field(label).type):
        labels, names = read_named_labels(files, label, names)
    else:
        labels = read_labels(files, label)
        names = names or numbered_classes(labels)
    check_range(labels, len(names))
    shape: tuple[int, ...] = (length,)
    if not is_text:
        shape = _first_shape(files[row_groups[0].file], row_groups[0].index, column, channels)
    source = Source(files, row_groups, column, label, names, shape, labels.values)
    _check_nulls(source)
    return source


def columns(path: str | Path, split: str) -> list[str]:
    """Names of the split's columns. Raises DataError."""
    return list(_schema(find_files(path, split)[0]).names)


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file} is not a readable Parquet file ({' '.join(str(error).split())}); download or write it again"
        ) from error


def _agreed_names(schemas: dict[Path, pa.Schema], label: str, classes: Sequence[str] | None) -> tuple[str, ...] | None:
    """The class names every file gives, or `classes`; None when nobody names them."""
    agreed = None if classes is None else tuple(classes)
    for file, schema in schemas.items():
        names = class_names(schema, file, label)
        if names is not None and agreed is not None and names != agreed:
            raise DataError(
                f"{file}, column {label!r}: the classes are {_some(names)}, but elsewhere {_some(agreed)}; "
                "wanted the same classes in the same order in all files and splits"
            )
        agreed = agreed or names
    return agreed


def _row_groups(files: Sequence[Path], column: str) -> tuple[RowGroup, ...]:
    """All row groups that have rows."""
    found: list[RowGroup] = []
    first_row = 0
    for number, file in enumerate(files):
        metadata = pq.read_metadata(file)
        for index in range(metadata.num_row_groups):
            num_rows = metadata.row_group(index).num_rows
            encoded_bytes = _chunk(metadata, index, column).total_uncompressed_size
            if num_rows:
                found.append(RowGroup(number, index, first_row, num_rows, encoded_bytes))
            first_row += num_rows
    return tuple(found)


def _check_nulls(source: Source) -> None:
    """DataError for a null image or text, if the statistics know of it; without statistics decode will find it."""
    metadata = [pq.read_metadata(file) for file in source.files]
    for group in source.row_groups:
        statistics = _chunk(metadata[group.file], group.index, source.parquet_column).statistics
        if statistics is not None and statistics.null_count:
            row = int(np.argmax(read_encoded(source, group).is_null().to_numpy()))
            if source.is_text:
                raise DataError(f"{source.where(group.first_row + row)}: {NULL_TEXT}")
            raise DataError(
                f"{source.where(group.first_row + row)}: image is null, wanted encoded bytes; "
                "embed the images in the file instead of their paths, or remove the row"
            )


def _chunk(metadata: pq.FileMetaData, index: int, column: str) -> pq.ColumnChunkMetaData:
    """Metadata of one column, as Parquet names it, in row group `index`."""
    group = metadata.row_group(index)
    chunks = (group.column(i) for i in range(group.num_columns))
    return next(chunk for chunk in chunks if chunk.path_in_schema == column)


def _first_shape(file: Path, index: int, image: str, channels: int | None) -> Shape:
    data = read_first(file, index, image)
    try:
        height, width, depth = decode_one(data, channels).shape
    except DataError as error:
        raise DataError(f"{file}, column {image!r}, row 0: {error}") from error
    return depth, height, width


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" ... ({len(names)} classes)" if len(names) > 3 else "")
