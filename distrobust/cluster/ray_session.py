"""A Ray to work on: a private one on this machine, stopped afterwards, or a cluster that runs already."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from distrobust.errors import CommError, ConfigError


@contextmanager
def session(address: str | None, setting: str, num_cpus: int, environment: Mapping[str, str]) -> Iterator[None]:
    """Connected to `address`, or to a private Ray with so many CPUs; environment: of all its workers.

    setting: what the address is called in the configuration. ConfigError where nobody answers or another version does,
    CommError if Ray does not start.
    """
    if address is not None:
        _check_address(address, setting)
    import ray

    private = address is None
    if private:  # it tells every user that the cluster we start and stop ourselves is protected by a token
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    try:
        ray.init(
            address="local" if private else address,
            num_cpus=num_cpus if private else None,
            include_dashboard=False if private else None,
            logging_level=logging.WARNING,
            log_to_driver=False,
            runtime_env={"env_vars": dict(environment)},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        ray.shutdown()
        text = " ".join(str(error).split())
        versions = re.search(r"cluster was started with: (.*?) This process .*? was started with: (.*?)$", text)
        if versions is not None:
            theirs, ours = versions.groups()
            raise ConfigError(
                f"{setting}: got {address}, a cluster of another version ({theirs}; here: {ours}); install that one "
                "here, or set it to null for a private Ray on this machine"
            ) from None
        where = "a private Ray" if private else f"{setting} {address}"
        raise CommError(f"{where}: cannot be used ({text[:200]})") from None
    try:
        yield
    finally:
        ray.shutdown()


def check_resources(wanted: Mapping[str, float], whose: str) -> None:
    """Raises ConfigError if the cluster can never give so much: Ray would wait for ever.

    whose: says who needs it and what to lower, as "cluster: 2 workers|cluster.workers".
    """
    import ray

    available = ray.cluster_resources()
    who, _, what = whose.partition("|")
    for resource, amount in wanted.items():
        if amount > available.get(resource, 0):
            raise ConfigError(
                f"{who} need {amount:g} {resource}, the Ray cluster has {available.get(resource, 0):g}; "
                f"lower {what}, or add nodes"
            )


def _check_address(address: str, setting: str) -> None:
    """Raises ConfigError if nobody listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # "auto", or a name that only Ray understands
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{setting}: got {address}, where no Ray head answers ({error}); start one there, or set it to null "
            "for a private Ray on this machine"
        ) from None
