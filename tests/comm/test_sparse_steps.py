"""Sparse steps through the real DDP: nothing is lost, all ranks apply the same, and traffic is what was asked for."""

import copy
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import Worker, batch, residuals, same, worker
from torch import Tensor, nn

from distrobust.comm.transport import AllGather, AllReduce, Local, Request, Transport
from distrobust.compression.codec import VALUE_CODES

pytestmark = pytest.mark.ranks


def local_gradients(worker: Worker, step: int) -> dict[str, Tensor]:
    """This rank's own gradient: the same model without DDP, the same batch."""
    twin = copy.deepcopy(worker.ddp.module)
    x, y = batch(step, worker.rank)
    twin.zero_grad()
    nn.functional.cross_entropy(twin(x), y).backward()
    return {name: p.grad.view(-1) for name, p in twin.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("values", VALUE_CODES)
def test_sent_plus_kept_equals_accumulated_over_all_ranks(num_ranks: int, values: str) -> None:
    """num_ranks x mean + sum of what is kept = sum of (kept before + gradient), in float64.

    What a rank keeps is exact (contracts/test_codecs.py), so only the mean rounds: an addition a rank and the division,
    each to 2^-24 of at most the sum of magnitudes sent, twice for the product taken here.
    """

    def body(rank: Rank) -> list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]]:
        ours = worker(rank, momentum="optimizer", sgd={"lr": 0.1}, values=values)
        history = []
        for step in range(4):
            gradients = local_gradients(ours, step)
            accumulated = {n: r.v + gradients[n] for n, r in ours.state.residuals.items()}
            ours.step(step)
            kept = {n: r.v.clone() for n, r in ours.state.residuals.items()}
            mean = {n: p.grad.view(-1).clone() for n, p in ours.ddp.module.named_parameters() if p.grad is not None}
            history.append((accumulated, kept, mean))
        return history

    for step in zip(*run_ranks(num_ranks, body), strict=True):
        assert any(bool(mean.any()) for mean in step[0][2].values())
        for name, mean in step[0][2].items():
            accumulated = torch.stack([one[0][name] for one in step]).double()
            kept = torch.stack([one[1][name] for one in step]).double()
            sent = (accumulated - kept).abs().sum(0)
            difference = num_ranks * mean.double() - (accumulated - kept).sum(0)
            assert bool((difference.abs() <= (num_ranks + 2) * 2.0**-24 * sent).all()), name


@pytest.mark.parametrize("selector", ["exact", "sampled"])
def test_each_large_tensor_sends_exactly_its_k_and_the_small_ones_share_theirs(selector: str) -> None:
    """One rank, density 0.02: 1,200 -> 24, 3,300 -> 66, 550 -> 11, and of 60 + 55 + 10 biases together 3 (2.5)."""

    def body(rank: Rank) -> None:
        ours = worker(rank, momentum="optimizer", sgd={"lr": 0.1}, values="fp32", selector=selector)
        for step in range(3):
            gradients = local_gradients(ours, step)
            accumulated = {n: r.v + gradients[n] for n, r in ours.state.residuals.items()}
            ours.step(step)
            mean = {n: p.grad.view(-1) for n, p in ours.ddp.module.named_parameters() if p.grad is not None}
            for name, k in (("0.weight", 24), ("2.weight", 66), ("4.weight", 11)):
                largest = accumulated[name].abs().topk(k).indices.sort().values
                assert mean[name].nonzero().view(-1).tolist() == largest.tolist()
                assert torch.equal(mean[name][largest], accumulated[name][largest])
            biases = ("0.bias", "2.bias", "4.bias")
            joined = torch.cat([accumulated[name] for name in biases])
            together = torch.cat([mean[name] for name in biases])
            assert together.nonzero().view(-1).tolist() == joined.abs().topk(3).indices.sort().values.tolist()

    run_ranks(1, body)


def test_both_selectors_train_to_the_same_bits() -> None:
    def body(rank: Rank) -> None:
        exact, sampled = (worker(rank, Wide, density=0.1, selector=s) for s in ("exact", "sampled"))
        for step in range(3):
            exact.step(step)
            sampled.step(step)
        assert same(exact.parameters(), sampled.parameters())
        assert same(residuals(exact.state), residuals(sampled.state))

    run_ranks(2, body)


class Wide(nn.Sequential):
    """12,000 weights in one tensor: at a density of 0.1 the sampled selector samples every 10th."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(20, 600), nn.Tanh(), nn.Linear(600, 10))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_parameters_are_bit_identical_on_all_ranks_after_many_steps(num_ranks: int) -> None:
    def body(rank: Rank) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ours = worker(rank, num_steps=50, density=0.01)
        for step in range(25):
            ours.step(step)
        return ours.parameters(), residuals(ours.state)

    results = run_ranks(num_ranks, body)
    for parameters, kept in results[1:]:
        assert same(parameters, results[0][0])
        assert not same(kept, results[0][1])  # the residuals are each rank's own


def test_the_same_run_twice_gives_the_same_bits() -> None:
    def body(rank: Rank) -> dict[str, Tensor]:
        ours = worker(rank)
        for step in range(6):
            ours.step(step)
        return residuals(ours.state)

    assert same(run_ranks(3, body)[1], run_ranks(3, body)[1])


def test_compressed_training_brings_the_loss_down_like_dense_training() -> None:
    """60 steps on one batch: at least four fifths of the way that dense SGD goes."""

    def body(rank: Rank) -> float:
        def loss(model: nn.Module) -> float:
            x, y = batch(0, rank.rank)
            with torch.no_grad():
                return float(nn.functional.cross_entropy(model(x), y))

        dense, sparse = worker(rank, density=1.0), worker(rank, density=0.05, num_steps=60)
        start = loss(dense.ddp.module)
        for _ in range(60):
            dense.step(0)
            sparse.step(0)
        return (start - loss(sparse.ddp.module)) / (start - loss(dense.ddp.module))

    assert min(run_ranks(2, body)) > 0.8


class Counting(Transport):
    """Records every collective."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        super().__init__(group)
        self.gathers: list[int] = []
        self.reduces: list[int] = []

    def issue(self, request: Request | Local) -> torch.futures.Future[Tensor]:
        assert isinstance(request, AllGather | AllReduce)
        (self.gathers if isinstance(request, AllGather) else self.reduces).append(request.tensor.numel())
        return super().issue(request)


@pytest.mark.parametrize("density", [0.02, 1.0])
def test_one_collective_for_each_bucket(density: float) -> None:
    """Buckets: one at first, and after DDP has rebuilt them one for each layer, since 2 KB hold 500 floats."""

    def body(rank: Rank) -> None:
        transport = Counting(rank.group)
        ours = worker(rank, density=density, transport=transport, ddp={"bucket_cap_mb": 0.002})
        reduce, buckets = ours.state.reduce, []

        def spy(bucket: Tensor, *arguments: Any, **flags: Any) -> Any:
            buckets.append(bucket)
            return reduce(bucket, *arguments, **flags)

        ours.state.reduce = spy  # type: ignore[method-assign]
        for step in range(4):
            transport.gathers, transport.reduces, buckets[:] = [], [], []
            ours.step(step)
            used, unused = (transport.gathers, transport.reduces)[:: 1 if density < 1 else -1]
            assert len(used) == len(buckets)
            assert unused == []
        assert len(buckets) >= 3

    run_ranks(2, body)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_bytes_handed_to_the_transport_are_counted_as_a_ring_carries_them(num_ranks: int) -> None:
    def body(rank: Rank) -> None:
        transport = Counting(rank.group)
        ours = worker(rank, transport=transport)
        for step in range(3):
            ours.step(step)
        assert ours.state.sent_bytes == (num_ranks - 1) * sum(transport.gathers)
        n = sum(p.numel() for p in ours.ddp.parameters())
        assert ours.state.dense_bytes == 3 * (2 * 4 * n * (num_ranks - 1) // num_ranks)

    run_ranks(num_ranks, body)


class ManySmall(nn.Module):
    """A hundred vectors of 32 beside one matrix of 100,000: 3 % of the parameters, nearly all of the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.ParameterList([nn.Parameter(torch.zeros(32)) for _ in range(100)])
        self.matrix = nn.Parameter(torch.zeros(100_000))

    def forward(self, x: Tensor) -> Tensor:
        return sum(v.sum() for v in self.vectors) * x[0] + (self.matrix * x[1]).sum()


def test_small_tensors_are_fused_so_that_traffic_is_density_times_n() -> None:
    """Density 0.001 of 103,200: 103 coordinates of 16 + 12 bits. Alone, the 100 vectors would send 100 more of them.
    On top come the shared exponents, a checksum, the status and 101 bits, and the first k of each section rounds up.
    """

    def body(rank: Rank) -> None:
        transport = Counting(rank.group)
        ours = worker(rank, ManySmall, density=0.001, values="fp16", transport=transport)
        ours.ddp(torch.tensor([0.5, 2.0])).backward()
        assert len(transport.gathers) == 1
        assert 103 * 3 <= transport.gathers[0] <= 1.1 * 103 * (28 / 8) + 2 + 4 + 1 + 13

    run_ranks(2, body)
