"""Small data sets whose images carry their row number, so that a test can tell which row it was given."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distrobust.data import write_parquet

NUM_CLASSES = 5
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

WriteNumbered = Callable[..., Path]
WriteTable = Callable[..., Path]


@pytest.fixture(scope="session")
def write_numbered() -> WriteNumbered:
    """write_numbered(directory, num_rows, row_group_size, name="train.parquet", first=0) -> directory.

    Row r is an RGB image of 2x3 pixels whose first two values are r % 256 and r // 256; its label is r % 5.
    """

    def write(directory: Path, num_rows: int, row_group_size: int, name: str = "train.parquet", first: int = 0) -> Path:
        rows = np.arange(first, first + num_rows)
        images = np.zeros((num_rows, 3, 2, 3), dtype=np.uint8)
        images[:, 0, 0, 0], images[:, 0, 0, 1] = rows % 256, rows // 256
        names = [f"class {i}" for i in range(NUM_CLASSES)]
        write_parquet(directory / name, images, rows % NUM_CLASSES, names, row_group_size)
        return directory

    return write


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """png(width=3, height=2, mode="RGB", value=0, format="PNG"): an encoded image of one colour."""

    def encode(width: int = 3, height: int = 2, mode: str = "RGB", value: Any = 0, format: str = "PNG") -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, (width, height), value).save(buffer, format)
        return buffer.getvalue()

    return encode


@pytest.fixture
def write_table(tmp_path: Path, png: Callable[..., bytes]) -> WriteTable:
    """write_table(images, labels, ...): a file in tmp_path as users bring it -> tmp_path."""

    def write(
        images: Sequence[bytes | None] | None = None,
        labels: Any = (0, 1, 2),
        *,
        image_column: str = "image",
        label_column: str = "label",
        image_type: Any = IMAGE_TYPE,
        label_type: Any = None,
        class_names: Sequence[str] | None = None,
        metadata: str | None = None,
        extra: dict[str, Any] | None = None,
        name: str = "train.parquet",
        **options: Any,
    ) -> Path:
        encoded = [png()] * len(labels) if images is None else images
        columns: dict[str, Any] = {}
        if image_type is not None:
            in_struct = pa.types.is_struct(image_type)
            rows = [{"bytes": data} for data in encoded] if in_struct else encoded
            columns[image_column] = pa.array(rows, image_type)
        if labels is not None:
            columns[label_column] = pa.array(labels, label_type)
        columns.update(extra or {})
        if class_names is not None:
            features = {label_column: {"_type": "ClassLabel", "names": list(class_names)}}
            metadata = json.dumps({"info": {"features": features}})
        table = pa.table(columns)
        if metadata is not None:
            table = table.replace_schema_metadata({"huggingface": metadata})
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / name, **options)
        return tmp_path

    return write
