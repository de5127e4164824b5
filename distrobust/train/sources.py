"""The data sets that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distrobust import data
from distrobust.config import Config, DataConfig
from distrobust.data import Shard, Source


def describe(settings: DataConfig) -> tuple[Source, Source]:
    """The training split and the test split, whose images and classes have to be those of the first."""
    source = describe_training(settings)
    return source, data.describe(
        settings.path,
        "test",
        image_column=settings.image_column,
        text_column=settings.text_column,
        label_column=settings.label_column,
        channels=None if source.is_text else source.shape[0],
        length=settings.length,
        classes=source.class_names,
    )


def describe_training(settings: DataConfig) -> Source:
    """The training split."""
    return data.describe(
        settings.path,
        "train",
        image_column=settings.image_column,
        text_column=settings.text_column,
        label_column=settings.label_column,
        length=settings.length,
    )


def describe_as_trained(path: Path, split: str, content: dict[str, Any]) -> Source:
    """A split for a model of images, read as its run read its own: by the same columns, where the data set has them.

    content: of the model file; those of 0.1.0 do not name columns.
    """
    there = data.columns(path, split)
    image, label = (name if name in there else None for name in (content.get("column"), content.get("label_column")))
    return data.describe(
        path,
        split,
        image_column=image,
        label_column=label,
        channels=content["shape"][0],
        classes=content["classes"],
    )


def shard(config: Config, source: Source, rank: int, num_ranks: int, rows: data.Selection | None) -> Shard:
    """A rank's part of `rows` (of all if None)."""
    settings = config.data
    return Shard(
        source,
        rank,
        num_ranks,
        config.run.seed,
        cache=settings.cache,
        memory_limit_bytes=settings.memory_limit_bytes,
        rows=rows,
    )
