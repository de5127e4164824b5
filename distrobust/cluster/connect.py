"""Joining a Ray cluster, or starting a private one: address, authentication, workers' variables, waiting for nodes."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distrobust.config import Config
from distrobust.errors import CommError, ConfigError
from distrobust.train import interface

HEAD = "DISTROBUST_HEAD"
"""Variable of the workers: host name or address of the head, on an existing cluster."""
_LOOK_S = 0.5


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Inside the block this process is a driver of the cluster that `config` names, which has what the workers need.

    Raises ConfigError if nobody answers there, or if it does not have enough within cluster.start_timeout_s.
    """
    settings = config.cluster
    private = settings.address is None
    # before ray is imported: its workers would otherwise change into a directory of their own, and start as if no
    # accelerator variable were set
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(settings.health_check_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(max(1.0, settings.start_timeout_s))
    if settings.auth is not None:
        os.environ["RAY_AUTH_MODE"] = settings.auth
    deadline = time.monotonic() + (0.0 if private else settings.start_timeout_s)
    if settings.address is not None:
        _wait_for_head(settings.address, deadline)
    import ray

    if private:  # it tells every user that the cluster we start and stop ourselves is protected by a token
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        ray.init(
            address="local" if private else settings.address,
            num_cpus=settings.workers * settings.threads if private else None,
            include_dashboard=False if private else None,
            logging_level=logging.WARNING,
            log_to_driver=False,
            runtime_env=runtime_environment(config),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "a private Ray" if private else f"cluster.address {settings.address}"
        raise CommError(f"{where}: cannot be used ({' '.join(str(error).split())[:200]})") from None
    try:
        _wait_for_resources(config, deadline)
        yield
    finally:
        ray.shutdown()


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


def _wait_for_head(address: str, deadline: float) -> None:
    """Raises ConfigError if nobody listens at host:port by then: Ray itself would try for minutes and say less."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # "auto", or a name that only Ray understands
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline or isinstance(error, OverflowError | socket.gaierror):
                raise ConfigError(
                    f"cluster.address: got {address}, where no Ray head answers ({error}); start one there, or set it "
                    "to null for a private Ray on this machine"
                ) from None
        time.sleep(_LOOK_S)


def _wait_for_resources(config: Config, deadline: float) -> None:
    """Waits for all workers' resources, at the deadline for the least the run can do with; else a ConfigError."""
    import ray

    while True:
        available = ray.cluster_resources()
        late = time.monotonic() > deadline
        missing = _missing(config, available, config.cluster.sizes[0 if late else -1])
        if missing is None:
            return
        if late:
            raise ConfigError(missing)
        time.sleep(_LOOK_S)


def _missing(config: Config, available: dict[str, float], workers: int) -> str | None:
    """What a cluster that has `available` lacks for so many workers: Ray would wait for it for ever."""
    settings = config.cluster
    wanted = {"CPU": workers * settings.threads, "GPU": workers if settings.gpu else 0}
    for resource, amount in wanted.items():
        if amount > available.get(resource, 0):
            return (
                f"cluster: {workers} workers need {amount} {resource}, the Ray cluster has "
                f"{available.get(resource, 0):g}; lower cluster.workers or cluster.threads, or add nodes"
            )
    return None
