"""Bandwidth and latency of the link between ranks, measured with the collectives that will use it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from distrobust.comm.transport import AllGather, Transport, request_bytes

PROBE_BYTES = 1 << 19  # at 10 Mbit/s half a second, at 10 Gbit/s still ten latencies
REPEATS = 3


@dataclass(frozen=True)
class Link:
    """`bytes_per_s` that a rank can send, `latency_s` of a collective without content."""

    bytes_per_s: float
    latency_s: float


def measure(transport: Transport, device: torch.device) -> Link:
    """Called by every rank; the slowest rank's view, the same on all of them."""
    small, large = torch.zeros(64, dtype=torch.uint8), torch.zeros(PROBE_BYTES, dtype=torch.uint8)
    seconds = []
    counted = transport.sent_bytes
    for message in (small, large):
        request = AllGather(message.to(device))
        transport.issue(request).wait()  # the first opens connections
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            transport.issue(request).wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        seconds.append(sorted(times)[REPEATS // 2])
    mine = torch.tensor(seconds, dtype=torch.float64)
    slowest = transport.gather_rows(mine.to(device)).amax(dim=0).cpu()
    transport.sent_bytes = counted  # not part of training
    latency, total = slowest.tolist()
    sent = request_bytes(AllGather(large), transport.num_ranks)
    return Link(sent / max(total - latency, 1e-9), latency)
