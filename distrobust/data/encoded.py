"""Encoded images, or texts, out of a Parquet file: one row group at a time, or only the very first image."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distrobust.data.source import RowGroup, Source
from distrobust.errors import DataError


def read_encoded(source: Source, group: RowGroup) -> pa.ChunkedArray:
    """The encoded images, or UTF-8 texts, of a row group: (group.num_rows,) binary, nulls kept.

    Raises DataError when the file cannot be read, or no longer has the rows it had when it was described.
    """
    file = source.files[group.file]
    try:
        with pq.ParquetFile(file) as parquet:
            table = parquet.read_row_group(group.index, columns=[source.parquet_column])
        if source.is_text:
            images = table.column(0).cast(pa.large_string()).cast(pa.large_binary())
        else:  # flatten(), unlike field(), promises a null for the bytes of a null struct
            images = pa.chunked_array([chunk.flatten()[0] for chunk in table.column(0).chunks])
    except (OSError, pa.ArrowException, IndexError) as error:
        raise unreadable(f"{file}, row group {group.index}", error) from error
    if len(images) != group.num_rows:
        raise DataError(
            f"{file}, row group {group.index}: {len(images)} rows, but it had {group.num_rows} before; "
            "a file must not be rewritten while it is in use: start again"
        )
    return images


def read_first(file: Path, index: int, image_column: str) -> bytes | None:
    """The first encoded image of row group `index`, without reading the rest; None for a null."""
    try:
        with pq.ParquetFile(file) as parquet:
            batch = next(parquet.iter_batches(1, row_groups=[index], columns=[f"{image_column}.bytes"]))
            data: bytes | None = batch.column(0).flatten()[0][0].as_py()
            return data
    except (OSError, pa.ArrowException) as error:
        raise unreadable(f"{file}, row group {index}", error) from error


def unreadable(place: str, error: BaseException) -> DataError:
    """Arrow's text may run over several lines; ours is one."""
    return DataError(f"{place}: cannot be read ({' '.join(str(error).split())}); copy the file again")
