"""Real processes and the default process group: what the tests on threads rest upon."""

import os
import signal
import socket
import stat
import struct
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness.ranks import Processes, Rank, run_ranks
from harness.training import residuals, same, worker
from torch import Tensor, nn

pytestmark = [pytest.mark.procs, pytest.mark.timeout(120)]
STARTUP_S = 60.0  # importing torch twice on busy cores


def tcp_bytes_sent() -> int:
    """Bytes of payload this process's TCP sockets have sent and seen acknowledged (Linux, TCP_INFO's bytes_acked)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        except OSError:  # gone meanwhile, or not TCP
            continue
        total += struct.unpack_from("Q", info, 120)[0] if len(info) >= 128 else 0
    return total


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2_000_000))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).sum()


def train_and_measure(rank: int, pipe: Connection) -> None:
    default = Rank(rank, 2, dist.group.WORLD)
    ours = worker(default)
    for step in range(5):
        ours.step(step)
    pipe.send((ours.parameters(), residuals(ours.state)))
    measured = []
    for density in (0.05, 1.0):
        large = worker(default, Large, density=density)
        gradient = torch.randn(2_000_000, generator=torch.Generator().manual_seed(rank))
        dist.barrier()
        counted, on_the_wire = large.state.sent_bytes, tcp_bytes_sent()
        for _ in range(3):
            large.ddp.zero_grad()
            large.ddp(gradient).backward()
        dist.barrier()  # what was sent has been received, if perhaps not acknowledged
        deadline = time.monotonic() + 5
        expected = large.state.sent_bytes - counted
        while tcp_bytes_sent() - on_the_wire < expected and time.monotonic() < deadline:
            time.sleep(0.05)
        measured.append((expected, tcp_bytes_sent() - on_the_wire))
    pipe.send(measured)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bytes on the wire are read from Linux' TCP_INFO")
def test_processes_train_like_threads_and_counted_bytes_are_those_on_the_wire(tmp_path: Path) -> None:
    """Bytes: 3 steps of about 0.25 MB sparse and 8 MB dense. Above them come gloo's own headers and DDP's barrier: less
    than 10 kB over so few messages, and nothing below: what is counted must be sent.
    """

    def body(rank: Rank) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ours = worker(rank)
        for step in range(5):
            ours.step(step)
        return ours.parameters(), residuals(ours.state)

    with Processes(2, train_and_measure, tmp_path, collective_timeout_s=30) as processes:
        in_processes = [processes.receive(rank, STARTUP_S) for rank in (0, 1)]
        measured = [processes.receive(rank, STARTUP_S) for rank in (0, 1)]
    for (parameters, kept), (parameters_, kept_) in zip(run_ranks(2, body), in_processes, strict=True):
        assert same(parameters, parameters_)
        assert same(kept, kept_)
    for sparse, dense in measured:
        for counted, sent in (sparse, dense):
            assert counted <= sent <= counted + 10_000, (sparse, dense)
        assert dense[0] == 3 * 8_000_000
        assert sparse[0] < dense[0] / 20


def train_until_alone(rank: int, pipe: Connection) -> None:
    ours = worker(Rank(rank, 2, dist.group.WORLD))
    for step in range(2):
        ours.step(step)
    if rank == 1:
        pipe.send("ready to die")
        time.sleep(STARTUP_S)
        return
    pipe.recv()
    before, kept = ours.parameters(), residuals(ours.state)
    started = time.monotonic()
    try:
        ours.step(2)
    except RuntimeError as error:
        text = str(error)
    else:
        text = "no error"
    try:
        ours.state.raise_cause()
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
    unchanged = same(before, ours.parameters()) and same(kept, residuals(ours.state))
    pipe.send((text, cause, unchanged, time.monotonic() - started))


def test_a_killed_peer_is_an_error_within_the_timeout_and_never_a_gradient(tmp_path: Path) -> None:
    timeout = timedelta(seconds=10).total_seconds()
    with Processes(2, train_until_alone, tmp_path, collective_timeout_s=timeout) as processes:
        assert processes.receive(1, STARTUP_S) == "ready to die"
        victim = processes.processes[1]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        processes.pipes[0].send("go on")
        text, cause, unchanged, seconds = processes.receive(0, STARTUP_S)
    assert text != "no error"
    assert cause.startswith("CommError: step 2: rank 0 of 2: a collective failed, so another rank died")
    assert unchanged
    assert seconds < timeout + 5
