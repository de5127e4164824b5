"""The decoded images of a simulation: what clients share out, what is held out, what is kept for the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrobust import data
from distrobust.data import Selection, Shard, Source
from distrobust.federated.settings import SimulateConfig


@dataclass(frozen=True)
class Rows:
    """images (rows, channels, height, width) uint8; labels (rows,) int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """groups (rows,) int64: numbers of the values of clients.column, of the training rows; None without one."""

    source: Source
    train: Rows
    held_out: Rows
    groups: NDArray[np.int64] | None


def load(config: SimulateConfig) -> Dataset:
    """Raises DataError for whatever does not fit."""
    settings = config.data
    source = data.describe(
        settings.path, "train", image_column=settings.image_column, label_column=settings.label_column
    )
    training, held_out = data.split_held_out(source, settings.held_out, config.run.seed)
    groups = None
    if config.clients.column is not None:
        groups = data.read_groups(source, config.clients.column)[1][training.rows()]
    return Dataset(source, _decoded(source, training), _decoded(source, held_out), groups)


def load_test(config: SimulateConfig, source: Source) -> Rows:
    """The test file, for the end."""
    settings = config.data
    test = data.describe(
        settings.path,
        "test",
        image_column=settings.image_column,
        label_column=settings.label_column,
        classes=source.class_names,
    )
    return _decoded(test, None)


def _decoded(source: Source, selection: Selection | None) -> Rows:
    shard = Shard(source, 0, 1, 0, cache="memory", rows=selection)
    batches = list(shard.in_order(shard.total_rows))
    return Rows(torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches]))
