"""Starting the train function without Ray: in this process, or as the ranks of torchrun."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import tempfile
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distrobust import config as configuration
from distrobust.config import Config
from distrobust.errors import CommError, ConfigError
from distrobust.metrics import Sink
from distrobust.train import interface, job
from distrobust.train.rundir import Outcome, RunDirectory
from distrobust.train.stopping import supervised

# with GPUs too, small rows of numbers travel from the CPU
BACKENDS = {False: "gloo", True: "cpu:gloo,cuda:nccl"}


def is_torchrun() -> bool:
    """Whether torchrun, or anything that sets its variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def check_local(config: Config) -> None:
    """Raises ConfigError unless the job is of one rank."""
    if config.cluster.workers != 1:
        raise ConfigError(
            f"cluster.workers: got {config.cluster.workers}, wanted 1 with cluster.launcher=local; "
            "use launcher ray or torchrun for more"
        )


def run_here(config: Config, console: Sink) -> Outcome:
    """One rank, in this process."""
    check_local(config)
    with tempfile.TemporaryDirectory() as directory:
        store = dist.FileStore(  # type: ignore[attr-defined]
            str(Path(directory) / "store"), 1
        )
        with _process_group(config, store=store, rank=0, world_size=1) as device:
            return job.run(config, device, [console])


def run_under_torchrun(config: Config, sinks: list[Sink]) -> Outcome:
    """This process is one of torchrun's; cluster.workers must agree with its world size."""
    world_size = int(os.environ["WORLD_SIZE"])
    if config.cluster.workers != world_size:
        raise ConfigError(
            f"cluster.workers: got {config.cluster.workers}, but torchrun started {world_size}; "
            f"pass --set cluster.workers={world_size}"
        )
    with _process_group(config) as device:
        return job.run(config, device, sinks)


def spawn_torchrun(config: Config) -> Outcome:
    """Starts one process per worker on this machine, as torchrun does, and waits for them.

    Ctrl-C asks the workers to write a checkpoint and leave; a second one kills them.
    Raises CommError if a worker died.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what is worth saying is said below
    os.environ["OMP_NUM_THREADS"] = str(config.cluster.threads)
    workers = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.cluster.workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    directory = RunDirectory(config.run.dir)
    failed = supervised(
        lambda: elastic_launch(workers, _rank)(config.model_dump(mode="json")), directory, _kill_children
    )
    reason = "the workers ended without a word"
    if isinstance(failed, ChildFailedError):
        rank, failure = failed.get_first_failure()
        reason = f"rank {rank} ended with exit code {failure.exitcode}"
        if isinstance(failure.message, str) and failure.exitcode > 0:
            reason += f" ({failure.message.strip().splitlines()[-1][:200]})"
    elif failed is not None:
        raise failed
    outcome = directory.outcome()
    if outcome is None:
        raise CommError(f"torchrun: {reason}; start again to continue from the last checkpoint")
    return outcome


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def _rank(values: dict[str, Any]) -> None:
    run_under_torchrun(configuration.parse(values, "launcher"), [])


@contextlib.contextmanager
def _process_group(config: Config, **options: object) -> Iterator[torch.device]:
    settings = config.cluster
    if settings.gpu and not torch.cuda.is_available():
        raise ConfigError("cluster.gpu: got true, but torch finds no CUDA device; set it to false")
    on_several = os.environ.get("LOCAL_WORLD_SIZE", "") != os.environ.get("WORLD_SIZE", "")
    interface.use(settings.interface, os.environ.get("MASTER_ADDR") if on_several else None)
    device = torch.device("cpu")
    if settings.gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = BACKENDS[settings.gpu]
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=settings.timeout_s), **options)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise CommError(f"process group: {' '.join(str(error).split())[:200]}") from None
    try:
        yield device
    finally:
        dist.destroy_process_group()
