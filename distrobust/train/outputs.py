"""Where a rank's records go: files of rank 0, a Prometheus exporter on each."""

from __future__ import annotations

import logging
import os

import torch.distributed as dist

from distrobust.config import Config
from distrobust.metrics import OptionalSink, Sink, tensorboard, weights_and_biases
from distrobust.metrics.jsonl import JsonLines
from distrobust.metrics.prometheus import Exporter
from distrobust.train.rundir import RunDirectory

_log = logging.getLogger(__name__)


def files(config: Config, directory: RunDirectory) -> list[Sink]:
    """Rank 0's files of records. ConfigError on every rank alike where one of them needs what is not installed."""
    settings = config.metrics
    if settings.tensorboard:
        tensorboard.require()
    if settings.wandb is not None:
        weights_and_biases.require(settings.wandb)
    if dist.get_rank() != 0:
        return []
    sinks: list[Sink] = [JsonLines(directory.metrics)]
    if settings.tensorboard:
        sinks.append(OptionalSink("metrics.tensorboard", tensorboard.TensorBoard(directory.tensorboard)))
    if settings.wandb is not None:
        kept = weights_and_biases.WeightsAndBiases(settings.wandb, directory.path)
        sinks.append(OptionalSink("metrics.wandb", kept))
    return sinks


def exporter(config: Config, directory: RunDirectory) -> Exporter | None:
    """None if the configuration has no port. A port that is taken is replaced by another, with a notice."""
    if config.metrics.port is None:
        return None
    rank = dist.get_rank()
    if rank == 0:
        _forget_targets(directory, dist.get_world_size())
    made = Exporter(
        directory.path.name,
        rank,
        host=config.metrics.host,
        port=config.metrics.port,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        file_sd=directory.targets,
        linger_s=config.metrics.linger_s,
        is_asked=directory.stop.exists,
    )
    if made.notice:
        _log.warning(made.notice)
    return made


def _forget_targets(directory: RunDirectory, num_ranks: int) -> None:
    """Of ranks that an earlier start had and this one has not: those that were killed have left theirs."""
    for path in directory.targets.glob("rank-*.json"):
        number = path.stem.removeprefix("rank-")
        if number.isdecimal() and int(number) >= num_ranks:
            path.unlink(missing_ok=True)
