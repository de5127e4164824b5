"""The lab's link as two hosts find it: payload bytes per second both ways at once, seconds for a round of nothing."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from distrobust.bench.rank import Say, process_group

_ROUNDS = 50


def measure(arguments: dict[str, Any], say: Say) -> dict[str, float]:
    """Arguments: `num_bytes` of the large message. Returns `bytes_per_s` (best of three) and `latency_s` (median)."""
    with process_group():
        small = [_seconds(64) for _ in range(_ROUNDS)]
        large = [_seconds(arguments["num_bytes"]) for _ in range(3)]
    nothing_s = statistics.median(small)  # an all-reduce of two is two rounds
    return {"bytes_per_s": arguments["num_bytes"] / (min(large) - nothing_s), "latency_s": nothing_s / 2}


def _seconds(num_bytes: int) -> float:
    """Each of two ranks sends the other `num_bytes`, in a ring all-reduce: half there, half back."""
    tensor = torch.zeros(num_bytes // 4)
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(tensor)
    return time.perf_counter() - started
