"""Writing a split in the Hugging Face image layout, so that every data set comes in the same way."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from distrobust.errors import DataError


def write_parquet(
    path: str | Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    row_group_size: int = 1000,
) -> None:
    """Writes columns `image` (PNG) and `label` and the class names to the file `path`, all of it or nothing.

    Args:
        images: (rows, C, H, W) uint8, C = 1 (gray) or 3 (RGB).
        labels: (rows,) integers in 0 .. len(class_names) - 1.
        row_group_size: rows per row group; a row group is what a worker reads at a time.

    Raises ValueError for arrays that do not fit, DataError when the file cannot be written.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {images.dtype} {images.shape}, wanted uint8 (rows, 1 or 3, H, W)")
    if labels.shape != (len(images),):
        raise ValueError(f"labels have shape {labels.shape}, wanted ({len(images)},)")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(f"labels are {labels.min()} .. {labels.max()}, wanted 0 .. {len(class_names) - 1}")
    encoded = [{"bytes": _to_png(image), "path": f"{row:06d}.png"} for row, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(encoded, kind), "label": pa.array(labels.astype(np.int64), pa.int64())}
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(class_names)}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    _write_atomically(table, Path(path), row_group_size)


def _to_png(image: NDArray[np.uint8]) -> bytes:
    """(C, H, W) -> a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def _write_atomically(table: pa.Table, path: Path, row_group_size: int) -> None:
    """Through a file beside `path`, so that an interrupted write never leaves half a split under its name."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # PNG is compressed already
        pq.write_table(table, partial, row_group_size=row_group_size, compression="none")
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); choose another directory") from error
    finally:
        with contextlib.suppress(OSError):  # not even the directory may exist
            partial.unlink(missing_ok=True)
