"""Starts one function in every host, follows the ranks, and leaves none behind.

    results = run(hosts, "distrobust.bench.step:measure", {"link": "100mbit"})

Each rank is a Python process with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME set; see `rank.py`
for its side. Arguments and results travel as JSON over pipes. A rank ends by itself when our end of its pipe closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from distrobust.errors import LabError
from distrobust.lab.hosts import Host

_PORT = 29400  # within a namespace every port is free


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    answers: int  # file descriptor to read JSON lines from
    errors: IO[bytes]
    buffer: bytes = b""
    result: dict[str, Any] | None = None
    said: list[Any] = field(default_factory=list)


def run(
    hosts: Sequence[Host],
    target: str,
    arguments: dict[str, Any],
    *,
    threads: int = 1,
    timeout_s: float = 3600.0,
    heard: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """Calls `target` ('module:function') with `arguments` in every host; returns what it returned, in rank order.

    threads: torch's, per rank. heard(rank, message): called for what a rank says while it runs. Raises LabError with
    the first error of any rank, after ending the others, and when `timeout_s` have passed.
    """
    ranks: list[_Rank] = []
    try:
        port = _PORT if hosts[0].shaped else _free_port()
        for number, host in enumerate(hosts):
            ranks.append(_start(number, host, hosts, port, target, arguments, threads))
        _follow(ranks, time.monotonic() + timeout_s, timeout_s, heard)
        return [rank.result["value"] for rank in ranks if rank.result is not None]
    finally:
        for rank in ranks:
            _end(rank)


def _start(
    number: int, host: Host, hosts: Sequence[Host], port: int, target: str, arguments: dict[str, Any], threads: int
) -> _Rank:
    reading, writing = os.pipe()
    errors = tempfile.TemporaryFile()  # noqa: SIM115  a pipe could fill up and stop the rank; closed in _end
    try:
        process = subprocess.Popen(
            [*host.enter, sys.executable, "-m", "distrobust.bench.rank", target, str(writing)],
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            pass_fds=(writing,),
            start_new_session=True,  # Ctrl-C is for us; we then end the ranks
            env={
                **os.environ,
                "RANK": str(number),
                "WORLD_SIZE": str(len(hosts)),
                "MASTER_ADDR": hosts[0].address,
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": host.interface,
                "OMP_NUM_THREADS": str(threads),
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # what we can import, they can
            },
        )
    finally:
        os.close(writing)
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(arguments).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it is gone already; _follow says why
    return _Rank(process, reading, errors)


def _follow(ranks: list[_Rank], deadline: float, timeout_s: float, heard: Callable[[int, Any], None] | None) -> None:
    """Reads what ranks say until every one has given its result."""
    with selectors.DefaultSelector() as selector:
        for number, rank in enumerate(ranks):
            selector.register(rank.answers, selectors.EVENT_READ, number)
        while selector.get_map():
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                waiting = ", ".join(str(number) for number, rank in enumerate(ranks) if rank.result is None)
                raise LabError(f"host {waiting}: no result within {timeout_s:.0f} s")
            for key, _ in events:
                rank = ranks[key.data]
                chunk = os.read(rank.answers, 65536)
                if not chunk:
                    selector.unregister(rank.answers)
                    if rank.result is None:
                        raise LabError(f"host {key.data}: {_epitaph(rank)}")
                rank.buffer += chunk
                *lines, rank.buffer = rank.buffer.split(b"\n")
                for line in lines:
                    _take(rank, key.data, json.loads(line), heard)


def _take(rank: _Rank, number: int, message: dict[str, Any], heard: Callable[[int, Any], None] | None) -> None:
    if "error" in message:
        raise LabError(f"host {number}: {message['error']}")
    if "value" in message:
        rank.result = message
    elif heard is not None:
        heard(number, message["said"])


def _epitaph(rank: _Rank) -> str:
    code = rank.process.wait(10)
    rank.errors.seek(0)
    lines = rank.errors.read().decode(errors="replace").strip().splitlines()
    how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how} without a result" + (f": {lines[-1]}" if lines else "")


def _end(rank: _Rank) -> None:
    """Waits for a rank that has finished, ends one that has not."""
    os.close(rank.answers)
    if rank.process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            rank.process.stdin.close()
    try:
        rank.process.wait(5.0 if rank.result is not None else 0.5)
    except subprocess.TimeoutExpired:
        rank.process.kill()
        rank.process.wait()
    rank.errors.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
