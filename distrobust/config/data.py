"""What is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from distrobust.config.section import (
    Count,
    Section,
)


class DataConfig(Section):
    path: Path
    """Directory with train.parquet and test.parquet in the Hugging Face layout (sharded names work too): images, or
    texts where there are none."""
    image_column: str | None = None
    """null: `image`, `img`, or the only column of encoded images."""
    text_column: str | None = None
    """null: `text` or `sentence`, where there is no image column."""
    length: Count = 256
    """Of texts, in bytes of UTF-8: longer ones are cut."""
    label_column: str | None = None
    """null: `label`, or its usual relatives. Integers, or strings that name the classes."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Share of the training rows never trained on, for accuracy during the run. The test file is for the end only."""
    cache: Literal["auto", "memory", "stream"] = "auto"
    """Decode once and keep, or row group by row group in every epoch; auto: keep what fits into memory_limit_bytes."""
    memory_limit_bytes: Count = 2 * 1024**3
    """Of decoded images, per rank and data set (training, held-out, test)."""
    crop: Annotated[int, Field(ge=0)] = 0
    """Augmentation: random crop after padding by this many pixels; 0: none."""
    flip: bool = False
    """Augmentation: horizontal flip of every other image."""
