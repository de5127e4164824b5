"""Where a run lives, what it leaves, how it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from distrobust.config.section import (
    Budget,
    Count,
    Seconds,
    Section,
)


class RunConfig(Section):
    dir: Path = Path("runs/default")
    """Directory of the run: resolved configuration, metrics, checkpoints, models, report. Starting again resumes it."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Everything random follows from it: initial weights, held-out split, data order, augmentation, attacks."""


class CheckpointConfig(Section):
    every: Count | None = None
    """Steps, besides the end of each epoch; null: only there."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; never fewer than two, so that one survives a crash during the next."""
    retries: Annotated[int, Field(ge=0, le=16)] = 3
    """Further attempts at a file that could not be written; if they fail too, training goes on without it."""
    backoff_s: Seconds = 1.0
    """Before the first further attempt; twice as long before each one after it."""

    @property
    def longest_wait_s(self) -> float:
        """What all retries of a file may wait."""
        return self.backoff_s * ((1 << self.retries) - 1)


class EvaluateConfig(Section):
    images: Annotated[int, Field(ge=0)] = 0
    """Test images attacked at the end, evenly spaced over the file; 0: all. Clean accuracy always uses all."""
    held_out_images: Annotated[int, Field(ge=0)] = 500
    """Held-out images attacked after each epoch; 0: all."""
    steps: Count = 20
    """PGD steps at the end; 10 after an epoch. The norm is that of the `attack` section."""
    batch_size: Count = 250
    """Per rank."""
    eps: Annotated[Budget, Field()] | None = None
    """null: attack.eps."""
    test: bool = True
    """false: leave the test file for later; only held-out rows are evaluated, after each epoch."""


class MetricsConfig(Section):
    every: Count = 20
    """Steps between records; ranks compare their parameters and look for a stop request then."""
    port: Annotated[int, Field(ge=0, le=65535)] | None = 9400
    """Prometheus, plus the local rank; another free port if taken; 0: any; null: no exporter."""
    host: str = "127.0.0.1"
    """Where the exporter listens."""
    linger_s: Annotated[float, Field(ge=0.0)] = 0.0
    """Seconds the exporter stays after the end, so that the last values are scraped."""
    tensorboard: bool = False
    """Curves for TensorBoard in RUN/tensorboard; needs distrobust[tensorboard]."""
    wandb: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")] | None = None
    """A project of Weights & Biases, kept in RUN/wandb: nothing is sent; needs distrobust[wandb]. null: none."""
