"""Starting the train function without Ray: in this process, or as the ranks of torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from distrobust.config import Config
from distrobust.errors import CommError, ConfigError
from distrobust.metrics import Sink
from distrobust.train import job
from distrobust.train.rundir import Outcome


def is_torchrun() -> bool:
    """Whether torchrun, or anything that sets its variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def run_here(config: Config, console: Sink) -> Outcome:
    """One rank, in this process."""
    if config.cluster.workers != 1:
        raise ConfigError(
            f"cluster.workers: got {config.cluster.workers}, wanted 1 with cluster.launcher=local; "
            "use launcher ray or torchrun for more"
        )
    with tempfile.TemporaryDirectory() as directory:
        store = dist.FileStore(  # type: ignore[attr-defined]
            str(Path(directory) / "store"), 1
        )
        with _process_group(config, store=store, rank=0, world_size=1) as device:
            return job.run(config, device, [console])


def run_under_torchrun(config: Config, console: Sink) -> Outcome:
    """This process is one of torchrun's; cluster.workers must agree with its world size."""
    world_size = int(os.environ["WORLD_SIZE"])
    if config.cluster.workers != world_size:
        raise ConfigError(
            f"cluster.workers: got {config.cluster.workers}, but torchrun started {world_size}; "
            f"pass --set cluster.workers={world_size}"
        )
    sinks = [console] if os.environ["RANK"] == "0" else []
    with _process_group(config) as device:
        return job.run(config, device, sinks)


def spawn_torchrun(config: Config, arguments: list[str]) -> int:
    """Runs `distrobust ARGUMENTS` under torchrun on this machine, one process per worker; returns its exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={config.cluster.workers}", "-m", "distrobust", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.cluster.threads)}
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the workers got the same signal: they write a checkpoint and leave


@contextmanager
def _process_group(config: Config, **options: object) -> Iterator[torch.device]:
    settings = config.cluster
    if settings.gpu and not torch.cuda.is_available():
        raise ConfigError("cluster.gpu: got true, but torch finds no CUDA device; set it to false")
    if settings.interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = settings.interface
    device = torch.device("cpu")
    if settings.gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if settings.gpu else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=settings.timeout_s), **options)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise CommError(f"process group: {' '.join(str(error).split())[:200]}") from None
    try:
        yield device
    finally:
        dist.destroy_process_group()
