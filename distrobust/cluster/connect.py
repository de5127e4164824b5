"""Joining a Ray cluster, or starting a private one: address, authentication, workers' variables, waiting for nodes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distrobust.cluster.ray_session import LOOK_S, missing, session
from distrobust.config import Config
from distrobust.errors import ConfigError
from distrobust.train import interface

HEAD = "DISTROBUST_HEAD"
"""Variable of the workers: host name or address of the head, on an existing cluster."""
_SHORTEST_START_S = 10.0


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Inside the block this process is a driver of the cluster that `config` names, which has what the workers need.

    Raises ConfigError if nobody answers there, or if it does not have enough within cluster.start_timeout_s.
    """
    settings = config.cluster
    # before ray is imported: its workers would otherwise change into a directory of their own, and start as if no
    # accelerator variable were set
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(settings.health_check_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(group_start_timeout_s(config))
    if settings.auth is not None:
        os.environ["RAY_AUTH_MODE"] = settings.auth
    deadline = time.monotonic() + (0.0 if settings.address is None else settings.start_timeout_s)
    cpus = settings.workers * settings.threads
    with session(settings.address, "cluster.address", cpus, runtime_environment(config), deadline):
        _wait_for_resources(config, deadline)
        yield


def group_start_timeout_s(config: Config) -> float:
    """How long Ray Train waits for a group of workers of one size before it looks again how many there can be.

    Right after a node was lost it still counts that node, and waits for as many workers as before.
    """
    settings = config.cluster
    if settings.min_workers is None:
        return max(1.0, settings.start_timeout_s)
    return max(_SHORTEST_START_S, min(settings.resize_every_s, settings.start_timeout_s))


def runtime_environment(config: Config) -> dict[str, Any]:
    """Ray's runtime_env of the workers: variables, and on several hosts the interface each one finds for itself."""
    settings = config.cluster
    variables = {"OMP_NUM_THREADS": str(settings.threads), **settings.environment}
    if settings.interface is not None:
        variables.update(dict.fromkeys(interface.VARIABLES, settings.interface))
    elif settings.address is not None:
        variables[HEAD] = _host(settings.address)
        return {"env_vars": variables, "worker_process_setup_hook": "distrobust.cluster.connect.find_interface"}
    return {"env_vars": variables}


def find_interface() -> None:
    """What every worker process runs first, on an existing cluster: names differ from host to host."""
    interface.use(None, os.environ.get(HEAD))


def _host(address: str) -> str:
    """Of `host:port`; for names that only Ray understands, such as auto, where this driver's Ray is."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        return host
    given = os.environ.get("RAY_ADDRESS", "")
    return given.rpartition("://")[2].rpartition(":")[0] or socket.gethostname()


def _wait_for_resources(config: Config, deadline: float) -> None:
    """Waits for all workers' resources, at the deadline for the least the run can do with; else a ConfigError."""
    settings = config.cluster
    while True:
        late = time.monotonic() > deadline
        workers = settings.sizes[0 if late else -1]
        wanted = {"CPU": workers * settings.threads, "GPU": workers if settings.gpu else 0}
        lacking = missing(wanted, f"cluster: {workers} workers", "cluster.workers or cluster.threads")
        if lacking is None:
            return
        if late:
            raise ConfigError(lacking)
        time.sleep(LOOK_S)
