"""Whole jobs inside the test's own process, and what they leave behind."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrobust.adversarial.threat import Threat
from distrobust.config import Config
from distrobust.evaluation.suite import Suite
from distrobust.metrics import jsonl
from distrobust.train import launch
from distrobust.train.evaluation import Job
from distrobust.train.evaluation_ranks import evaluate
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


def evaluated(path: Path, data: Path, out: Path, steps: int, images: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Clean and PGD of a model file, at Linf 0.05, in batches of 250 as at the end of a run."""
    suite = Suite(Threat("linf", 0.05), steps=steps, checks=False)
    record = evaluate(Job(path, data, suite, out, images=images, batch=250, seed=seed, threads=1))
    assert record is not None
    return [result["score"] for result in record["results"]]
