"""A small data set in memory, a digits directory on disk, and simulations of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distrobust import data, models
from distrobust.data import Source
from distrobust.federated import settings
from distrobust.federated.dataset import Dataset, Rows
from distrobust.federated.simulate import Simulation

torch.set_num_threads(1)
SHAPE = (1, 8, 8)
Simulate = Callable[..., Simulation]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.write_digits(tmp_path_factory.mktemp("digits"))


def made_up(num_rows: int = 240, num_classes: int = 4, seed: int = 0) -> Dataset:
    """Images whose class can be learned, and four groups of rows."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows + 60)
    images = rng.integers(0, 120, (len(labels), *SHAPE)) + 30 * labels[:, None, None, None]
    everything = torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)
    source = Source((), (), "image", "label", tuple(map(str, range(num_classes))), SHAPE, labels)
    train, held_out = (Rows(*(one[part] for one in everything)) for part in (slice(num_rows), slice(num_rows, None)))
    return Dataset(source, train, held_out, np.arange(num_rows) % 4)


def module(name: str = "mlp", num_classes: int = 4) -> nn.Module:
    return models.build(name, num_classes, SHAPE, [0.5], [0.25], seed=1)


@pytest.fixture
def simulate(tmp_path: Path) -> Iterator[Simulate]:
    """simulate(section={...}, ...) -> a simulation of the made-up data; closed at the end."""
    opened: list[Simulation] = []

    def make(dataset: Dataset | None = None, **sections: Any) -> Simulation:
        name = sections.get("model", "linear")
        values = {"data": {"path": "nowhere"}, "model": name, **sections}
        scratch = tmp_path / f"scratch-{len(opened)}"
        opened.append(Simulation(settings.parse(values, "test"), dataset or made_up(), module(name), scratch))
        return opened[-1]

    yield make
    for one in opened:
        one.__exit__()
