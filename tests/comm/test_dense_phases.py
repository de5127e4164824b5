"""Dense phases are DistributedDataParallel with torch.optim.SGD, and switching to and from them loses nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import SGD, Worker, residuals, same, worker
from torch import Tensor, nn

import distrobust

pytestmark = pytest.mark.ranks

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "weight_decay": {"lr": 0.1, "weight_decay": 0.01},
    "all": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


@pytest.mark.parametrize("sgd", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_density_one_equals_ddp_with_sgd_to_the_bit(sgd: dict[str, Any], num_ranks: int) -> None:
    def body(rank: Rank) -> None:
        plain = worker(rank, density=None, sgd=sgd)
        ours = worker(rank, density=1.0, sgd=sgd)
        for step in range(5):
            plain.step(step)
            ours.step(step)
            assert same(plain.parameters(), ours.parameters()), f"step {step}"

    run_ranks(num_ranks, body)


@pytest.mark.parametrize("ddp", [{"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str)
def test_density_one_equals_ddp_with_sgd_in_every_mode_of_ddp(ddp: dict[str, Any]) -> None:
    def body(rank: Rank) -> None:
        plain, ours = worker(rank, density=None, ddp=ddp), worker(rank, density=1.0, ddp=ddp)
        for step in range(4):
            plain.step(step)
            ours.step(step)
        assert same(plain.parameters(), ours.parameters())

    run_ranks(2, body)


def test_warmup_of_density_one_equals_ddp_until_it_ends() -> None:
    def body(rank: Rank) -> None:
        plain = worker(rank, density=None)
        ours = worker(rank, density=0.02, num_steps=8, warmup=0.5, ladder=(1.0,))
        for step in range(6):
            plain.step(step)
            ours.step(step)
            assert same(plain.parameters(), ours.parameters()) == (step < 4)

    run_ranks(2, body)


def with_plan(worker: Worker, *plan: float) -> Worker:
    """With a density for each step."""
    worker.state.density = SimpleNamespace(at=plan.__getitem__)  # type: ignore[assignment]
    return worker


class Linear(nn.Module):
    """A loss whose gradient is its input, whatever the parameters: trajectories can be compared term by term."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.zeros(30, 20))
        self.small = nn.Parameter(torch.zeros(40))

    def forward(self, large: Tensor, small: Tensor) -> Tensor:
        return (self.large * large).sum() + (self.small * small).sum()


def push(worker: Worker, step: int) -> None:
    g = torch.Generator().manual_seed(100 * step + worker.rank)
    worker.optimizer.zero_grad()
    worker.ddp(torch.randn(30, 20, generator=g), torch.randn(40, generator=g)).backward()
    worker.optimizer.step()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_dense_sparse_dense_applies_in_total_what_sgd_applies(nesterov: bool, values: str) -> None:
    """Without factor masking everything is linear in the gradients, so sparse steps only delay: the dense step behind
    them empties every residual, and parameters and momentum are those of a run that was never sparse.

    Tolerance: 12 steps, each with fewer than 20 roundings of numbers below 64 (lr 1): 12 x 20 x 64 x 2^-24 = 9.2e-4.
    """
    sgd = {"lr": 1.0, "momentum": 0.9, "nesterov": nesterov}
    plan = (1.0, 1.0, 1.0, 0.05, 0.05, 0.1, 0.02, 0.05, 0.05, 1.0, 1.0, 1.0)

    def body(rank: Rank) -> None:
        plain = worker(rank, Linear, density=None, sgd=sgd)
        ours = with_plan(worker(rank, Linear, density=0.05, sgd=sgd, masking=False, values=values), *plan)
        for step, density in enumerate(plan):
            push(plain, step)
            push(ours, step)
            after_dense = density == 1.0 and (step < 3 or step >= 9)
            if after_dense:
                torch.testing.assert_close(ours.parameters(), plain.parameters(), rtol=0, atol=9.2e-4)
            else:
                assert not torch.allclose(ours.parameters()["large"], plain.parameters()["large"], atol=0.1)
        for name, p in plain.ddp.module.named_parameters():
            residual = ours.state.residuals[name]
            assert residual.settled
            assert not residual.v.any()
            buffer = plain.optimizer.state[p]["momentum_buffer"].view(-1)
            torch.testing.assert_close(residual.u, buffer, rtol=0, atol=9.2e-4)

    run_ranks(2, body)


def test_the_dense_step_after_sparse_ones_applies_the_mean_of_all_residuals() -> None:
    """Masking on: mean over ranks of v + (m u + g), to a rounding of each of the sums."""

    def body(rank: Rank) -> dict[str, tuple[Tensor, Tensor]]:
        ours = with_plan(worker(rank, Linear, density=0.05, sgd={"lr": 1.0, "momentum": 0.5}), 0.05, 0.05, 0.05, 1.0)
        for step in range(3):
            push(ours, step)
        before, kept = ours.parameters(), residuals(ours.state)
        push(ours, 3)
        g = torch.Generator().manual_seed(300 + rank.rank)
        gradient = {"large": torch.randn(30, 20, generator=g), "small": torch.randn(40, generator=g)}
        result = {}
        for name, p in ours.parameters().items():
            local = kept[f"{name}.v"] + 0.5 * kept[f"{name}.u"] + gradient[name].view(-1)
            result[name] = local, (before[name] - p).view(-1)
        return result

    first, second = run_ranks(2, body)
    for name in first:
        expected = (first[name][0] + second[name][0]) / 2
        torch.testing.assert_close(first[name][1], expected, rtol=0, atol=8 * 16 * 2.0**-24)  # 8 roundings below 16


def test_momentum_survives_the_first_sparse_step() -> None:
    def body(rank: Rank) -> None:
        ours = with_plan(worker(rank, Linear, density=0.05, sgd={"lr": 1.0, "momentum": 0.5}), 1.0, 1.0, 0.05)
        push(ours, 0)
        push(ours, 1)
        before = residuals(ours.state)["large.u"]
        assert bool(before.any())
        push(ours, 2)
        g = torch.randn(30, 20, generator=torch.Generator().manual_seed(200 + rank.rank)).view(-1)
        after = ours.state.residuals["large"].u
        kept = after != 0
        assert int(kept.sum()) == 600 - 30
        assert torch.equal(after[kept], (0.5 * before + g)[kept])

    run_ranks(2, body)


def test_momentum_gathered_before_compress_continues_exactly() -> None:
    def body(rank: Rank) -> None:
        plain = worker(rank, density=None)
        late = worker(rank, density=None)
        for step in range(3):
            plain.step(step)
            late.step(step)
        distrobust.compress(late.ddp, late.optimizer, density=1.0)
        for step in range(3, 6):
            plain.step(step)
            late.step(step)
            assert same(plain.parameters(), late.parameters())

    run_ranks(2, body)


@pytest.mark.parametrize(("num_ranks", "density"), [(2, 0.9), (4, 0.6)])
def test_where_sparse_messages_would_be_larger_the_step_is_dense(num_ranks: int, density: float) -> None:
    """fp32 values: an all-gather of (N-1)(4 + bits/8) d n bytes against a ring's 8 n (N-1)/N: break-even at about
    8 / (N x 4.3), so 0.93 for two ranks in fp32 and 0.46 for four.
    """

    def body(rank: Rank) -> None:
        plain = worker(rank, density=None, sgd=SGD)
        ours = worker(rank, density=density, sgd=SGD, values="fp32")
        assert ours.state.density_at(0) == (1.0 if num_ranks == 4 else density)
        for step in range(2):
            plain.step(step)
            ours.step(step)
        assert same(plain.parameters(), ours.parameters()) == (num_ranks == 4)
        assert (ours.state.sent_bytes == ours.state.dense_bytes) == (num_ranks == 4)
        assert ours.state.sent_bytes <= ours.state.dense_bytes

    run_ranks(num_ranks, body)
