"""Functions that tests of the bench run in its hosts; see distrobust/bench/launch.py."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from distrobust.bench.rank import Say, process_group
from distrobust.errors import ConfigError
from distrobust.lab.counters import tcp_sent_bytes, wire_sent


def exchange(arguments: dict[str, Any], say: Say) -> dict[str, Any]:
    """All-reduces `num_bytes` of ones; what it cost, and the sum."""
    import torch
    import torch.distributed as dist  # here, so that the functions below start at once

    interface = arguments["interface"]
    with process_group(30.0):
        tensor = torch.ones(arguments["num_bytes"] // 4)
        dist.barrier()
        wire = wire_sent(interface) if interface else None
        tcp, started = tcp_sent_bytes(), time.perf_counter()
        dist.all_reduce(tensor)
        seconds = time.perf_counter() - started
        dist.barrier()
        tcp = tcp_sent_bytes() - tcp
        after = wire_sent(interface) if interface else None
        say("nearly done")
    return {
        "seconds": seconds,
        "tcp_bytes": tcp,
        "wire_bytes": after.bytes - wire.bytes if after and wire else None,
        "packets": after.packets - wire.packets if after and wire else None,
        "sum": float(tensor[0]),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")},
    }


def fail_on_one(arguments: dict[str, Any], say: Say) -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("two lines\nof text")
    time.sleep(60)


def refuse(arguments: dict[str, Any], say: Say) -> None:
    raise ConfigError("compress.values: got '5bit'")


def die(arguments: dict[str, Any], say: Say) -> None:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(arguments: dict[str, Any], say: Say) -> None:
    say(os.getpid())
    time.sleep(60)
