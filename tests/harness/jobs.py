"""Whole jobs inside the test's own process, and what they leave behind."""

from typing import Any

import torch
from torch import Tensor

from distrobust.config import Config
from distrobust.metrics import jsonl
from distrobust.train import launch
from distrobust.train.modelfile import read_model_file
from distrobust.train.rundir import Outcome, RunDirectory


class Silent:
    def write(self, record: Any) -> None: ...

    def close(self) -> None: ...


def run_job(config: Config) -> Outcome:
    RunDirectory(config.run.dir).open(config)
    outcome = launch.run_here(config, Silent())
    outcome.raise_if_failed()
    return outcome


def weights_of(config: Config, model: str = "fine-tuned") -> dict[str, Tensor]:
    return read_model_file(config.run.dir / f"models/{model}.pt")["state"]  # type: ignore[no-any-return]


def records_of(config: Config, event: str) -> list[dict[str, Any]]:
    return [record for record in jsonl.read(config.run.dir / "metrics.jsonl") if record["event"] == event]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    differing = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not differing


class Crash(BaseException):
    """As sudden as SIGKILL: no handler of the program sees it coming, and nothing is saved."""
