"""Evaluates a model file on a data set: batches shared out over ranks, verdicts kept, everything said at the end.

A rank takes every num_ranks-th batch through all trials in order; what it finds for a batch does not depend on
how many ranks there are. Ranks talk through the directory of verdicts alone, so they need no process group: they
are this process, processes it starts (`workers`), or torchrun's, on any machines that share the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distrobust import data
from distrobust.errors import ConfigError, ModelError
from distrobust.evaluation.evaluation import standing, summary
from distrobust.evaluation.suite import Suite
from distrobust.evaluation.trial import Trial, Verdict, attempt
from distrobust.train.modelfile import build_model, load_model_file, read_model_file, refuse_text
from distrobust.train.scoring import spaced_rows
from distrobust.train.sources import describe_as_trained
from distrobust.train.verdicts import VerdictDirectory

Progress = Callable[[str, int, int], None]  # (trial in words, batches done, batches)


@dataclass(frozen=True)
class Job:
    """What to evaluate; the same on every rank. It can be pickled.

    images: evenly spaced over the test split; 0: all. batch: images attacked together, and kept or lost together.
    source: another model file, for transfer. out: directory of the verdicts. threads: torch's, per rank; 0: the
    cores shared out. gpu: one a rank.
    """

    checkpoint: Path
    data: Path
    suite: Suite
    out: Path
    images: int = 0
    batch: int = 100
    seed: int = 0
    source: Path | None = None
    threads: int = 0
    gpu: bool = False


class Opened:
    """A job whose files were read and found to fit together."""

    def __init__(self, job: Job) -> None:
        """Raises ModelError for a file that is missing, damaged or does not fit the data, DataError, ConfigError."""
        self.job = job
        content = read_model_file(job.checkpoint)
        refuse_text(content, job.checkpoint)
        self.data = describe_as_trained(job.data, "test", content)
        self.net = _load(job.checkpoint, content, self.data)
        self.source = None if job.source is None else _load(job.source, read_model_file(job.source), self.data)
        total = self.data.total_rows
        count = min(job.images or total, total)
        self.labels: NDArray[np.int64] = self.data.labels[np.linspace(0, total - 1, count).round().astype(np.int64)]
        self.trials = job.suite.trials(count, self.data.num_classes, self.data.shape)
        self.num_batches = -(-count // job.batch)
        self.directory = VerdictDirectory(job.out)

    def settings(self) -> dict[str, Any]:
        """What determines the images and the random numbers; the trials' keys name the rest."""
        job, rows = self.job, [(group.num_rows, group.encoded_bytes) for group in self.data.row_groups]
        described = json.dumps([self.data.class_names, self.data.shape, rows]).encode()
        return {
            "checkpoint": _digest(job.checkpoint),
            "data": hashlib.sha256(described + self.data.labels.tobytes()).hexdigest(),
            "source": None if job.source is None else _digest(job.source),
            "images": len(self.labels),
            "batch": job.batch,
            "seed": job.seed,
            "torch": torch.__version__,
        }

    def done(self, found: dict[tuple[str, int], Verdict]) -> Iterator[tuple[Trial, int]]:
        """Every trial with how many of its batches are done."""
        for trial in self.trials:
            yield trial, sum((trial.key, index) in found for index in range(self.num_batches))


def run_rank(
    opened: Opened,
    rank: int,
    num_ranks: int,
    progress: Progress | None = None,
    abandoned: Callable[[], bool] = lambda: False,
) -> None:
    """Does what is not done of batches rank, rank + num_ranks, ... of every trial; asks `abandoned` before each."""
    job = opened.job
    mine = range(rank, opened.num_batches, num_ranks)
    device = _device(job, rank)
    net, source = opened.net.to(device), None if opened.source is None else opened.source.to(device)
    done = opened.directory.read()
    with opened.directory.writer(rank) as write:
        if all((trial.key, index) in done for trial in opened.trials for index in mine):
            return
        shard = data.Shard(opened.data, 0, 1, seed=0)
        for trial in opened.trials:
            todo = [index for index in mine if (trial.key, index) not in done]
            for index, (x, y) in enumerate(_batches(shard, job)) if todo else ():
                if index not in todo:
                    continue
                if abandoned():
                    return
                verdict = attempt(
                    trial,
                    net,
                    x,
                    y,
                    seed=job.seed,
                    index=index,
                    first=index * job.batch,
                    standing=standing(trial, index, done),
                    source=source,
                )
                write(trial.key, index, verdict)
                done[trial.key, index] = verdict
                if progress is not None:
                    progress(trial.describe(), sum((trial.key, i) in done for i in mine), len(mine))


def record(opened: Opened) -> dict[str, Any]:
    """Everything there is to say, from the verdicts in the directory, which must be complete; also written there."""
    job = opened.job
    evaluation = summary(opened.trials, opened.directory.read(), opened.labels, opened.data.num_classes, job.seed)
    content = asdict(evaluation) | {
        "checkpoint": str(job.checkpoint),
        "data": str(job.data),
        "source": None if job.source is None else str(job.source),
        "classes": list(opened.data.class_names),
        "suite": asdict(job.suite),
        "settings": opened.settings(),
        "versions": {name: _version(name) for name in ("distrobust", "torch", "foolbox", "pyautoattack")},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "gpu": job.gpu},
    }
    opened.directory.write_record(content)
    return content


def _load(path: Path, content: dict[str, Any], source: data.Source) -> nn.Module:
    if list(source.shape) != content["shape"]:
        raise ModelError(
            f"{path} was trained on images of shape {tuple(content['shape'])}, those of the data set are "
            f"{tuple(source.shape)} (channels, height, width)"
        )
    if list(source.class_names) != content["classes"]:
        raise ModelError(f"{path} was trained on other classes than those of the data set")
    net = build_model(content["model"], source, seed=0)
    load_model_file(net, path)
    return net.eval()


def _batches(shard: data.Shard, job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of the job, `job.batch` at a time, the last may be fewer; the same on every rank."""
    images, labels = torch.empty(0, *shard.source.shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    for x, y in spaced_rows(shard, job.images, job.batch):
        images, labels = torch.cat([images, x]), torch.cat([labels, y])
        while len(labels) >= job.batch:
            yield images[: job.batch], labels[: job.batch]
            images, labels = images[job.batch :], labels[job.batch :]
    if len(labels):
        yield images, labels


def _device(job: Job, rank: int) -> torch.device:
    if not job.gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--gpu: torch finds no CUDA device; leave it out")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
