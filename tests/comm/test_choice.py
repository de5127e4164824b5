"""Which exchange and which density: chosen by bytes, by a budget, or by the link as it is."""

import itertools
import logging
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.ranks import Processes, Rank, run_ranks
from harness.training import worker

from distrobust.comm import choice, hook, link
from distrobust.comm.link import Link
from distrobust.comm.together import in_process
from distrobust.comm.transport import Local, Request, Transport, request_bytes
from distrobust.errors import ConfigError
from distrobust.optim.lanton import Lanton


@pytest.mark.parametrize(
    ("num_ranks", "expected"), [(2, "all_gather"), (4, "all_gather"), (5, "sharded"), (64, "sharded")]
)
def test_auto_takes_the_exchange_that_sends_least_unless_it_is_close(num_ranks: int, expected: str) -> None:
    chosen = choice.choose("auto", None, in_process(num_ranks)[0], "")
    assert chosen.exchange == expected
    assert f"{num_ranks} workers" in chosen.reason


@pytest.mark.parametrize("wanted", ["all_gather", "sharded"])
def test_what_was_asked_for_is_taken(wanted: str) -> None:
    assert choice.choose(wanted, None, in_process(64)[0], "").exchange == wanted


def test_step_ahead_stays_with_all_gather() -> None:
    assert choice.choose("auto", None, in_process(64)[0], "step-ahead").exchange == "all_gather"


@pytest.mark.parametrize(
    ("launched", "size"),
    [
        ([(2, 0), (2, 1), (2, 0), (2, 1)], 2),
        ([(2, 0), (2, 1)] * 3, 2),
        ([(3, 0), (3, 1), (3, 2)] * 2, 3),
        ([(2, 0), (2, 1), (1, 0), (1, 0)], 1),  # machines of different size
        ([(1, 0), (1, 0), (2, 0), (2, 1)], 1),
        ([(4, 0), (4, 1), (4, 2), (4, 3), (2, 0), (2, 1)], 1),
        ([(2, 0), (2, 0), (2, 1), (2, 1)], 1),  # numbered across machines
        ([(4, 0), (4, 1), (4, 2), (4, 3)], 1),  # one machine
        ([(1, 0)] * 4, 1),
        ([(1, 0)], 1),
    ],
    ids=str,
)
def test_levels_need_machines_of_one_size_numbered_one_after_the_other(
    launched: list[tuple[int, int]], size: int
) -> None:
    assert choice.machine_size(torch.tensor(launched)) == size


def test_hierarchical_on_one_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="got 4 workers, 4 on this machine"):
        choice.choose("hierarchical", None, in_process(4)[0], "")


@pytest.mark.ranks
def test_hierarchical_in_a_group_of_ones_own_is_refused() -> None:
    def body(rank: Rank) -> None:
        with pytest.raises(ConfigError, match="hierarchical needs the default process group"):
            worker(rank, exchange="hierarchical")

    run_ranks(4, body)


def choose_all(rank: int, pipe: Connection) -> None:
    """What `auto` becomes on four processes that are launched in one way after the other."""
    default = Rank(rank, 4, dist.group.WORLD)
    for layout in LAYOUTS:
        os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = map(str, layout[rank])
        for options in ({}, {"density": 1.0}, {"clip": 1.0}):
            ours = worker(default, exchange="auto", **options)
            ours.step(0)
            local = ours.state.settings.transport.local
            pipe.send((1 if local is None else local.num_ranks, sum(float(p.sum()) for p in ours.ddp.parameters())))


LAYOUTS = [[(2, 0), (2, 1), (2, 0), (2, 1)], [(2, 0), (2, 1), (1, 0), (1, 0)], [(4, 0), (4, 1), (4, 2), (4, 3)]]


@pytest.mark.procs
@pytest.mark.timeout(120)
def test_all_ranks_choose_the_same_however_they_are_spread_over_machines(tmp_path: Path) -> None:
    """Two levels only where machines are alike, something is compressed, and nothing needs whole gradients."""
    with Processes(4, choose_all, tmp_path, collective_timeout_s=20) as processes:
        found = [[processes.receive(rank, timeout_s=60) for _ in range(9)] for rank in range(4)]
    assert all(one == found[0] for one in found)
    assert [size for size, _ in found[0]] == [2, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.ranks
def test_the_exchange_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distrobust")

    def body(rank: Rank) -> None:
        ours = worker(rank, num_steps=10)
        for step in range(3):
            ours.step(step)

    run_ranks(2, body)
    assert sum("exchange all_gather (2 workers: all_gather sends" in r.getMessage() for r in caplog.records) == 2


@pytest.mark.ranks
@pytest.mark.parametrize("factor", [3.0, 10.0])
@pytest.mark.parametrize("options", [{}, {"warmup": 0.2}, {"warmup": 0.0, "final_steps": 2, "final_density": 0.5}])
def test_a_whole_run_stays_within_its_byte_budget(factor: float, options: dict[str, Any]) -> None:
    """One bucket is counted on. Should DDP make two of this model, the second adds 6 bytes of header, the end of a
    unary code, and low bits filled up to a whole group of eight: under 16 bytes in all.
    """
    num_steps = 40

    def body(rank: Rank) -> float:
        settings = {"density": "auto", "fewer_bytes": factor, "num_steps": num_steps, "warmup": 0.0, "values": "fp16"}
        ours = worker(rank, **settings | options)
        for step in range(num_steps):
            ours.step(step)
        return (ours.state.sent_bytes - 16 * num_steps) * factor / ours.state.dense_bytes

    for used in run_ranks(2, body):
        assert 0.9 < used <= 1.0


@pytest.mark.ranks
def test_a_time_budget_fills_the_link_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook.link, "measure", lambda *_: Link(bytes_per_s=20_000.0, latency_s=0.01))

    def body(rank: Rank) -> None:
        state = worker(rank, density="auto", exchange_s=0.11, warmup=0.0).state
        assert 0.95 * 2000 < state.step_bytes(state.density.density) <= 2000
        fast = worker(rank, density="auto", exchange_s=10.0, warmup=0.0).state
        assert fast.density_at(0) == 1.0
        with pytest.raises(ConfigError, match="allow more bytes or time"):
            worker(rank, density="auto", exchange_s=0.001, warmup=0.0)

    run_ranks(2, body)


@pytest.mark.ranks
def test_every_rank_measures_the_same_link_and_counts_no_bytes_for_it() -> None:
    def body(rank: Rank) -> tuple[Link, int]:
        transport = Transport(rank.group)
        return link.measure(transport, torch.device("cpu")), transport.sent_bytes

    (first, sent), *others = run_ranks(3, body)
    assert first.bytes_per_s > 0
    assert first.latency_s > 0
    assert sent == 0
    assert all(other == (first, 0) for other in others)


@pytest.mark.ranks
def test_lanton_wants_whole_gradients_for_its_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    choose = choice.choose

    def watched(*arguments: Any) -> choice.Choice:
        asked.append(arguments[3])
        return choose(*arguments)

    monkeypatch.setattr(choice, "choose", watched)
    for noise in ("none", "previous"):

        def lanton(parameters: Any, noise: str = noise) -> Lanton:
            return Lanton([{"params": list(parameters), "norm": "frobenius"}], noise=noise)

        run_ranks(2, lambda rank: worker(rank, optimizer=lanton, momentum="optimizer"))
    assert asked == ["", "", "noise", "noise"]


class Clock(threading.local):
    """Stands in for the module time: every rank's thread has a time of its own."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Paced(Transport):
    """Waiting for a request moves `clock` by the latency and the bytes of a link, and by what comes between: a second
    the first time, as connections are opened, and half a second once among the three times that are measured.
    """

    def __init__(self, rank: Rank, clock: Clock, modelled: Link) -> None:
        super().__init__(rank.group)
        self.clock, self.modelled = clock, modelled
        self.between = itertools.cycle((1.0, 0.0, 0.5, 0.0))

    def issue(self, request: Request | Local) -> Any:
        assert not isinstance(request, Local)
        seconds = self.modelled.latency_s + request_bytes(request, self.num_ranks) / self.modelled.bytes_per_s
        seconds += next(self.between)
        future = super().issue(request)

        def wait() -> Any:
            self.clock.now += seconds
            return future.wait()

        return SimpleNamespace(wait=wait)


@pytest.mark.ranks
@pytest.mark.parametrize("slowest", [Link(1.25e6, 0.04), Link(1.25e8, 0.0005)], ids=str)
def test_latency_and_rate_of_the_slowest_rank_are_measured(slowest: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves by what a link of this kind takes. The message without content has 64 of the 2^19 bytes of
    the other, to each of 2 ranks: they count as latency and make the rate 1.3e-4 too high.
    """
    clock = Clock()
    monkeypatch.setattr(link, "time", clock)

    def body(rank: Rank) -> Link:
        faster = Link(3 * slowest.bytes_per_s, slowest.latency_s / 2)
        transport = Paced(rank, clock, slowest if rank.rank == 1 else faster)
        return link.measure(transport, torch.device("cpu"))

    for measured in run_ranks(3, body):
        assert measured.latency_s == pytest.approx(slowest.latency_s + 2 * 64 / slowest.bytes_per_s)
        assert measured.bytes_per_s == pytest.approx(slowest.bytes_per_s, rel=1.3e-4)
