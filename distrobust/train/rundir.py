"""A run's directory: what is where, whom it belongs to, and the few words driver and workers exchange through it.

    config.yaml      the resolved configuration
    metrics.jsonl    one record a line
    logs/            rank-N.jsonl: what the rank's loggers said, see logs.py
    stacks/          where ranks were when none got on, see stall.py
    checkpoints/     see checkpoint.py
    models/          pre-trained.pt, fine-tuned.pt: weights to evaluate or to start from
    prometheus/      one file_sd target list per rank
    tensorboard/, wandb/    if metrics.tensorboard, metrics.wandb
    report.html
    lock             held by the start that is running
    faults/          which injected faults have struck, if any were asked for
    stop             its presence asks the workers to checkpoint and leave
    outcome.json     how the last start ended

It must be on storage that all workers share.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distrobust import config as configuration
from distrobust import errors
from distrobust.config import Config
from distrobust.errors import CheckpointError, ConfigError, DistrobustError


@dataclass(frozen=True)
class Outcome:
    """How a start ended. `status`: done, stopped (continue by starting again) or failed (see `error`, `text`)."""

    status: str
    error: str = ""
    text: str = ""

    def raise_if_failed(self) -> None:
        """Raises the error the workers met, with its own type."""
        if self.status == "failed":
            raise getattr(errors, self.error, DistrobustError)(self.text)


class RunDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.models = path / "models"
        self.targets = path / "prometheus"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"
        self.stacks = path / "stacks"
        self.stop = path / "stop"
        self.faults = path / "faults"
        self._outcome = path / "outcome.json"

    def open(self, config: Config) -> None:
        """Creates it, or continues what it has checkpoints of; ConfigError if those are another configuration's."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.config.exists() and (self.checkpoints.exists() or self.models.exists()):
            theirs = configuration.load(self.config).identity()
            difference = configuration.first_difference(config.identity(), theirs)
            if difference:
                raise ConfigError(
                    f"run.dir {self.path} belongs to another configuration ({difference}); "
                    "set run.dir to a new directory, or undo the change to continue this run"
                )
        write_atomically(self.config, configuration.dump(config))
        self.stop.unlink(missing_ok=True)
        self._outcome.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps every other start out while the block runs; raises ConfigError if one is at work already.

        Also if the directory is a simulation's, whose configuration has a section `clients`.
        """
        if self.config.exists() and "clients" in configuration.read(self.config):
            raise ConfigError(
                f"run.dir {self.path} holds a run of `distrobust simulate`; set run.dir to another directory"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.dir {self.path}: cannot be created ({error.strerror}); set run.dir") from None
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"run.dir {self.path} is in use by another start; wait for it, or set run.dir"
                ) from None
            yield

    def write_outcome(self, outcome: Outcome) -> None:
        write_atomically(self._outcome, json.dumps(asdict(outcome)))

    def outcome(self) -> Outcome | None:
        """None while no worker has said anything."""
        try:
            values: dict[str, Any] = json.loads(self._outcome.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CheckpointError(f"{self._outcome}: not JSON ({error}); delete it and start again") from None
        return Outcome(**values)


def own_name(path: Path) -> Path:
    """A hidden name beside `path` that nobody else has; processes of other hosts may have this one's number."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def write_atomically(path: Path, text: str) -> None:
    """The file holds either its old or its new text, also if this process dies meanwhile."""
    temporary = own_name(path)
    temporary.write_text(text)
    os.replace(temporary, path)
