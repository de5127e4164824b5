"""Exchanges of several hops and levels through the real DistributedDataParallel; their laws are in contracts/."""

import queue
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness.ranks import Processes, Rank, run_ranks
from harness.training import Worker, batch, mlp, residuals, same, seeded, worker
from torch import Tensor, nn

from distrobust.comm.exchange import EXCHANGES
from distrobust.comm.transport import Local, Request, Transport
from distrobust.errors import ConfigError

SMALL_BUCKETS = {"bucket_cap_mb": 1e-3}  # every tensor in one of its own once DDP has rebuilt them
each_exchange = pytest.mark.parametrize("exchange", EXCHANGES)


def two_levels(rank: Rank, num_local: int) -> Transport:
    """Ranks 0 to num_local - 1 are the first machine."""
    machine, local = divmod(rank.rank, num_local)
    num_machines = rank.num_ranks // num_local
    across = rank.subgroup([m * num_local + local for m in range(num_machines)])
    within = rank.subgroup([machine * num_local + i for i in range(num_local)])
    return Transport(across, local=Transport(within))


@pytest.mark.ranks
@each_exchange
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_hold_the_same_parameters_after_every_step(exchange: str, num_ranks: int) -> None:
    """Several buckets under way at once, over the step at which DDP rebuilds them."""

    def body(rank: Rank) -> list[dict[str, Tensor]]:
        ours = worker(rank, exchange=exchange, values="4bit", indices="rice", ddp=SMALL_BUCKETS)
        history = []
        for step in range(4):
            ours.step(step)
            history.append(ours.parameters())
        return history

    results = run_ranks(num_ranks, body)
    for history in results[1:]:
        assert all(same(mine, theirs) for mine, theirs in zip(history, results[0], strict=True))
    assert not same(results[0][0], results[0][3])


@pytest.mark.ranks
@each_exchange
@pytest.mark.parametrize("num_ranks", [4, 6])
@pytest.mark.parametrize("density", [0.02, 1.0])
def test_two_levels_hold_the_same_parameters_on_every_rank_of_every_machine(
    exchange: str, num_ranks: int, density: float
) -> None:
    """Machines of two ranks, several buckets under way at once."""

    def body(rank: Rank) -> dict[str, Tensor]:
        ours = worker(rank, exchange=exchange, density=density, ddp=SMALL_BUCKETS, transport=two_levels(rank, 2))
        for step in range(5):
            ours.step(step)
        assert ours.state.error is None
        return ours.parameters()

    results = run_ranks(num_ranks, body)
    assert all(same(one, results[0]) for one in results[1:])
    assert not same(results[0], {name: p.detach() for name, p in seeded(mlp).named_parameters()})


@pytest.mark.ranks
@pytest.mark.parametrize(
    "sgd", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}], ids=str
)
def test_a_dense_phase_over_two_levels_is_ddp_with_sgd(sgd: dict[str, Any]) -> None:
    """Sums of four numbers below 1 in another order: 5 steps of 4 roundings of 2^-24, x 10 by momentum."""

    def body(rank: Rank) -> None:
        plain = worker(rank, density=None, sgd=sgd)
        ours = worker(rank, density=1.0, sgd=sgd, transport=two_levels(rank, 2), ddp=SMALL_BUCKETS)
        for step in range(5):
            plain.step(step)
            ours.step(step)
        torch.testing.assert_close(ours.parameters(), plain.parameters(), rtol=0, atol=5 * 4 * 10 * 2.0**-24)

    run_ranks(4, body)


@pytest.mark.ranks
@pytest.mark.parametrize(("exchange", "levels"), [("sharded", 1), ("all_gather", 2), ("sharded", 2)])
def test_compressed_training_follows_dense_training(exchange: str, levels: int) -> None:
    """40 steps on one batch: at least four fifths of the way that dense SGD goes, as with all_gather."""

    def body(rank: Rank) -> float:
        def loss(model: nn.Module) -> float:
            x, y = batch(0, rank.rank)
            with torch.no_grad():
                return float(nn.functional.cross_entropy(model(x), y))

        transport = two_levels(rank, 2) if levels == 2 else None
        dense = worker(rank, density=1.0)
        sparse = worker(rank, density=0.05, num_steps=40, exchange=exchange, transport=transport)
        start = loss(dense.ddp.module)
        for _ in range(40):
            dense.step(0)
            sparse.step(0)
        return (start - loss(sparse.ddp.module)) / (start - loss(dense.ddp.module))

    assert min(run_ranks(2 * levels, body)) > 0.8


def scaled_step(worker: Worker, scaler: torch.amp.GradScaler, step: int, factor: float = 1.0) -> None:
    x, y = batch(step, worker.rank)
    worker.optimizer.zero_grad()
    scaler.scale(factor * nn.functional.cross_entropy(worker.ddp(x), y)).backward()
    scaler.step(worker.optimizer)
    scaler.update()


@pytest.mark.ranks
@each_exchange
@pytest.mark.parametrize("levels", [1, 2])
def test_loss_scaling_changes_no_bit_and_an_overflow_skips_the_step_on_all_ranks(exchange: str, levels: int) -> None:
    """Scales are powers of two, and change: after an overflow on one rank, and every second step."""

    def body(rank: Rank) -> dict[str, Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        options = {"exchange": exchange, "ddp": SMALL_BUCKETS}
        levelled = [two_levels(rank, 2) if levels == 2 else None for _ in range(2)]
        plain = worker(rank, transport=levelled[0], **options)
        ours = worker(rank, transport=levelled[1], scaler=scaler, **options)
        for step in range(3):
            plain.step(step)
            scaled_step(ours, scaler, step)
        before, parameters = residuals(ours.state), ours.parameters()
        scale = scaler.get_scale()
        scaled_step(ours, scaler, 9, 3e38 if rank.rank == 1 else 1.0)
        assert ours.state.skipped
        assert scaler.get_scale() == scale / 2
        assert same(residuals(ours.state), before)
        assert same(ours.parameters(), parameters)
        for step in range(3, 5):
            plain.step(step)
            scaled_step(ours, scaler, step)
        assert same(residuals(ours.state), residuals(plain.state))
        assert same(ours.parameters(), plain.parameters())
        return ours.parameters()

    results = run_ranks(2 * levels, body)
    assert all(same(one, results[0]) for one in results[1:])


class Reporting(nn.Module):
    """Says through `about_to` that backward comes to the gradients of a layer: those behind it are in their buckets."""

    def __init__(self, about_to: Callable[[str], None]) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(n, m, bias=False) for n, m in ((20, 40), (40, 40), (40, 10)))
        self.about_to = about_to

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in (("first", self.first), ("middle", self.middle)):
            x = torch.tanh(layer(x))
            x.register_hook(lambda _, name=name: self.about_to(name))
        return self.last(x)


class Answer(torch.futures.Future[Tensor]):
    """Not to be waited for before it is there."""

    def wait(self) -> Tensor:
        assert self.done(), "backward waits for a message while gradients are still to be computed"
        return super().wait()


class HeldBack(Transport):
    """While it `holds`, an answer is on its way until `arrive` hands it over."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.holds = False
        self.issued = 0
        self.on_the_way: queue.Queue[tuple[torch.futures.Future[Tensor], Answer]] = queue.Queue()

    def issue(self, request: Request | Local) -> torch.futures.Future[Tensor]:
        self.issued += 1
        arrived = super().issue(request)
        if not self.holds:
            return arrived
        answer = Answer()
        self.on_the_way.put((arrived, answer))
        return answer

    def arrive(self, num_requests: int) -> None:
        """queue.Empty unless so many more requests are issued, by this thread or another."""
        for _ in range(num_requests):
            arrived, answer = self.on_the_way.get(timeout=20)
            answer.set_result(arrived.wait())


@pytest.mark.ranks
@each_exchange
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_the_first_bucket_travels_while_the_last_gradients_are_computed(exchange: str, density: float) -> None:
    """Three buckets. The first one's message is on its way when backward comes to the middle layer, and is not waited
    for; before the first layer's gradients the middle one's is too, and with two hops the first one's second.
    """
    hops = 2 if exchange == "sharded" and density < 1.0 else 1

    def body(rank: Rank) -> None:
        transport = HeldBack(rank.group)
        arrived: list[str] = []

        def about_to(layer: str) -> None:
            if transport.holds:
                transport.arrive(1 if layer == "middle" else hops)
                arrived.append(layer)
            transport.holds = transport.holds and layer != "first"

        options = {"density": density, "exchange": exchange, "transport": transport, "ddp": SMALL_BUCKETS}
        ours = worker(rank, lambda: Reporting(about_to), **options)
        for step in range(3):  # DDP rebuilds its buckets after the first
            transport.holds, transport.issued = step == 2, 0
            ours.step(step)
        assert arrived == ["middle", "first"]
        assert transport.on_the_way.empty()
        assert transport.issued == 3 * hops

    run_ranks(2, body)


def train_all(rank: int, pipe: Connection) -> None:
    """Four processes: every exchange among all of them, and between two machines of two."""
    default = Rank(rank, 4, dist.group.WORLD)
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    within = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    for exchange in EXCHANGES:
        for transport in (None, Transport(across, local=Transport(within))):
            ours = worker(default, exchange=exchange, transport=transport, ddp=SMALL_BUCKETS)
            for step in range(3):
                ours.step(step)
            pipe.send((ours.parameters(), residuals(ours.state)))
    pipe.recv()  # tensors travel as handles: whoever sent them must be there when they are received


@pytest.mark.procs
@pytest.mark.timeout(120)
def test_processes_train_like_threads_with_every_exchange_and_on_two_levels(tmp_path: Path) -> None:
    def body(rank: Rank) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        results = []
        for exchange in EXCHANGES:
            for transport in (None, two_levels(rank, 2)):
                ours = worker(rank, exchange=exchange, transport=transport, ddp=SMALL_BUCKETS)
                for step in range(3):
                    ours.step(step)
                results.append((ours.parameters(), residuals(ours.state)))
        return results

    with Processes(4, train_all, tmp_path, collective_timeout_s=30) as processes:
        for rank, expected in enumerate(run_ranks(4, body)):
            for parameters, kept in expected:
                parameters_, kept_ = processes.receive(rank, timeout_s=90)
                assert same(parameters, parameters_)
                assert same(kept, kept_)
            processes.pipes[rank].send("received")


@pytest.mark.ranks
def test_clipping_by_pieces_of_a_gradient_is_refused() -> None:
    def body(rank: Rank) -> None:
        with pytest.raises(ConfigError, match=r"compress.clip: .* set compress.exchange to all_gather or sharded"):
            worker(rank, transport=two_levels(rank, 2), clip=1.0)

    run_ranks(4, body)
