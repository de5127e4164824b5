"""A job small enough to run whole in a second or two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import Tensor

from distrobust import config as configuration
from distrobust.config import Config
from distrobust.data import write_parquet
from distrobust.train import loop
from distrobust.train.state import TrainState
from distrobust.train.step import Recipe, StepResult, train_step
from tests.harness.jobs import Crash

MakeConfig = Callable[..., Config]


def write_stripes(directory: Path, num_train: int = 160, num_test: int = 40) -> Path:
    """Four classes of 8x8 gray images, told apart by which quarter of the rows is bright."""
    rng = np.random.default_rng(0)
    for split, rows in (("train", num_train), ("test", num_test)):
        labels = rng.integers(0, 4, rows)
        images = rng.integers(0, 120, (rows, 1, 8, 8))
        for image, label in zip(images, labels, strict=True):
            image[0, 2 * label : 2 * label + 2] += 120
        names = ["first", "second", "third", "fourth"]
        write_parquet(directory / f"{split}.parquet", images.astype(np.uint8), labels, names, 32)
    return directory


def with_other_labels(path: Path, directory: Path) -> Path:
    """A copy in which column `label` is of no use, and `coarse` and `picture` are what `label` and `image` were."""
    directory.mkdir()
    for file in path.glob("*.parquet"):
        table = pq.read_table(file)
        label = pa.array(np.zeros(len(table), dtype=np.int64))
        table = table.append_column("coarse", table["label"]).append_column("picture", table["image"])
        pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", label), directory / file.name)
    return directory


@pytest.fixture(scope="session")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("stripes"))


@pytest.fixture
def make_config(stripes: Path, tmp_path: Path) -> MakeConfig:
    """make_config("a.b=c", ...): the small job in a run directory of this test's own."""

    def make(*overrides: str) -> Config:
        values: dict[str, Any] = {
            "run": {"dir": str(tmp_path / "run")},
            "cluster": {"launcher": "local", "workers": 1, "timeout_s": 20},
            "data": {"path": str(stripes), "held_out": 0.2},
            "model": {"name": "cnn"},
            "pretrain": {"epochs": 1, "batch_size": 32},
            "train": {"epochs": 2, "batch_size": 32},
            "attack": {"name": "pgd", "steps": 2, "eps": 0.05, "ramp": 0.5},
            "compress": {"density": 0.05},
            "noise": {},
            "checkpoint": {"every": 2},
            "metrics": {"every": 2, "port": None},
        }
        for override in overrides:
            configuration.override(values, override)
        return configuration.parse(values, "test")

    return make


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """crash_at(phase, step): the next run dies before that step."""

    def plan(phase: str, step: int) -> None:
        def dying(state: TrainState, images: Tensor, labels: Tensor, recipe: Recipe, rank: int) -> StepResult:
            if (state.position.phase, state.position.step) == (phase, step):
                raise Crash
            return train_step(state, images, labels, recipe, rank)

        monkeypatch.setattr(loop, "train_step", dying)

    return plan
