"""A Ray to work on: a private one on this machine, stopped afterwards, or a cluster that runs already."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distrobust.errors import CommError, ConfigError

_log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Between two looks at what is waited for."""


@contextmanager
def session(
    address: str | None, setting: str, num_cpus: int, runtime_env: Mapping[str, Any], deadline: float = 0.0
) -> Iterator[None]:
    """Connected to `address`, or to a private Ray with so many CPUs; runtime_env: of all its workers.

    setting: what the address is called in the configuration; deadline: time.monotonic() until which a head may begin to
    answer. ConfigError where nobody answers or another version does, CommError if Ray does not start.
    """
    if address is not None:
        _wait_for_head(address, setting, deadline)
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
            runtime_env=dict(runtime_env),
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


def missing(wanted: Mapping[str, float], who: str, lower: str) -> str | None:
    """What the cluster lacks for that: Ray would wait for it for ever. who needs it, and what they can lower."""
    import ray

    available = ray.cluster_resources()
    for resource, amount in wanted.items():
        if amount > available.get(resource, 0):
            return (
                f"{who} need {amount:g} {resource}, the Ray cluster has {available.get(resource, 0):g}; "
                f"lower {lower}, or add nodes"
            )
    return None


def _wait_for_head(address: str, setting: str, deadline: float) -> None:
    """Raises ConfigError if nobody listens at host:port by then: Ray itself would try for minutes and say less."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # "auto", or a name that only Ray understands
    said = False
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline or isinstance(error, OverflowError | socket.gaierror):
                raise ConfigError(
                    f"{setting}: got {address}, where no Ray head answers ({error}); start one there, or set it "
                    "to null for a private Ray on this machine"
                ) from None
            if not said:
                _log.warning(
                    "%s: nobody answers at %s yet; waiting %.0f s", setting, address, deadline - time.monotonic()
                )
                said = True
        time.sleep(LOOK_S)
