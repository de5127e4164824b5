"""Any other column of the Parquet files, as group numbers: whose a row is."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distrobust.data.encoded import unreadable
from distrobust.data.source import Source
from distrobust.errors import DataError


def read_groups(source: Source, column: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The distinct values as text, in order of first appearance, and every row's number among them (total_rows,).

    Raises DataError for a missing column, one that cannot be compared, and for a null.
    """
    parts = []
    for file in source.files:
        schema = pq.read_schema(file)
        if column not in schema.names:
            raise DataError(f"{file} has no column {column!r}: its columns are {', '.join(schema.names)}")
        try:
            part = pq.read_table(file, columns=[column]).column(0)
            part = part.cast(pa.string())
        except (OSError, pa.ArrowException) as error:
            raise unreadable(f"{file}, column {column!r}", error) from error
        if part.null_count:
            row = int(np.argmax(part.is_null().to_numpy()))
            raise DataError(f"{file}, column {column!r}, row {row}: null, wanted a value in every row; remove the row")
        parts.extend(part.chunks)
    encoded = pa.chunked_array(parts, pa.string()).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    encoded = encoded.dictionary_encode()
    return tuple(encoded.dictionary.to_pylist()), encoded.indices.to_numpy().astype(np.int64)
