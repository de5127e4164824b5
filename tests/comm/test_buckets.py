"""How DDP hands over gradients does not matter: buckets, views, memory formats, no_sync, unused parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import Worker, residuals, same, worker
from torch import Tensor, nn

import distrobust
from distrobust.compression.density import Schedule

pytestmark = pytest.mark.ranks


def trained(rank: Rank, num_steps: int = 5, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ours = worker(rank, **options)
    for step in range(num_steps):
        ours.step(step)
    return ours.parameters(), residuals(ours.state)


@pytest.mark.parametrize("density", [0.02, 1.0])
@pytest.mark.parametrize(
    "ddp",
    [
        {"bucket_cap_mb": 1e-3},  # every tensor in a bucket of its own, so that some hold small tensors only
        {"bucket_cap_mb": 4e-3},
        {"gradient_as_bucket_view": True},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-3},
        {"static_graph": True, "bucket_cap_mb": 1e-3},
        {"find_unused_parameters": True, "bucket_cap_mb": 1e-3},
    ],
    ids=str,
)
def test_bucket_size_and_mode_do_not_change_the_result(ddp: dict[str, Any], density: float) -> None:
    """To the bit, over the step at which DDP rebuilds its buckets. The default, 25 MB, puts everything in one."""

    def body(rank: Rank) -> None:
        expected, kept = trained(rank, density=density)
        parameters, residual = trained(rank, density=density, ddp=ddp)
        assert same(parameters, expected)
        assert same(residual, kept)

    run_ranks(2, body)


def test_buckets_do_get_rebuilt_in_these_tests() -> None:
    def body(rank: Rank) -> list[list[str]]:
        ours = worker(rank, ddp={"bucket_cap_mb": 1e-3})
        reduce, seen = ours.state.reduce, []

        def spy(bucket: Tensor, parts: list[Any], **flags: Any) -> Any:
            seen.append([part.name for part in parts])
            return reduce(bucket, parts, **flags)

        ours.state.reduce = spy  # type: ignore[method-assign]
        ours.step(0)
        first = len(seen)
        ours.step(1)
        return [seen[:first], seen[first:]]  # type: ignore[list-item]

    first, second = run_ranks(2, body)[0]
    assert first != second


class Conv(nn.Sequential):
    def __init__(self, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5)
        )
        self.to(memory_format=memory_format)


def channels_last() -> nn.Module:
    return Conv(torch.channels_last)


def images(step: int, rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(50 * step + rank)
    return torch.randn(4, 3, 6, 6, generator=g), torch.randint(5, (4,), generator=g)


def step_on_images(worker: Worker, step: int) -> None:
    x, y = images(step, worker.rank)
    worker.optimizer.zero_grad()
    nn.functional.cross_entropy(worker.ddp(x), y).backward()
    worker.optimizer.step()


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_a_channels_last_network_trains_like_a_contiguous_one(density: float) -> None:
    """The forward adds in another order; gradients differ by rounding: sums of up to 128 terms of order 1 in 3 layers
    and back. Over 4 steps at lr 0.1 with momentum (x 3.4): 6 x 128 x 2^-24 x 4 x 0.34 = 6e-5, a hundredth of the steps
    themselves. fp32 on the wire, since a rounding to 11 bits turned over would show. A coordinate of nearly the k-th
    magnitude might change places; these seeds hold none.
    """

    def body(rank: Rank) -> None:
        usual, other = (worker(rank, build, density=density, values="fp32") for build in (Conv, channels_last))
        start = usual.parameters()
        for step in range(4):
            step_on_images(usual, step)
            step_on_images(other, step)
        weight = other.ddp.module[0].weight
        assert not weight.is_contiguous()
        for name, p in usual.parameters().items():
            assert "bias" in name or (p - start[name]).abs().max() > 0.01
            torch.testing.assert_close(other.parameters()[name], p, rtol=0, atol=1e-4)

    run_ranks(2, body)


class Strided(nn.Module):
    """Parameters in the memory format `lay` gives them, and gradients that do not depend on it."""

    def __init__(self, lay: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.weights = nn.ParameterList(
            [
                nn.Parameter(lay(torch.randn(shape, generator=g)))
                for shape in ((8, 6, 3, 3), (7, 1, 3, 3), (12, 10, 1, 1))
            ]
        )

    def forward(self, step: int, rank: int) -> Tensor:
        g = torch.Generator().manual_seed(10 * step + rank)
        return sum((w * torch.randn(w.shape, generator=g)).sum() for w in self.weights)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def _with_gaps(t: Tensor) -> Tensor:
    """Every second entry of a larger tensor whose dimensions are swapped: neither dense nor in order."""
    larger = torch.zeros(t.shape[1], t.shape[0], t.shape[2], 2 * t.shape[3]).transpose(0, 1)[..., ::2]
    return larger.copy_(t)


LAYS = {"channels-last": _channels_last, "transposed": _transposed, "with gaps": _with_gaps}


@pytest.mark.parametrize("lay", LAYS.values(), ids=LAYS.keys())
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_memory_format_changes_nothing_and_state_moves_between_formats(
    lay: Callable[[Tensor], Tensor], density: float
) -> None:
    """To the bit: parameters, residuals, momentum, decay; also a state saved in one format, loaded in another."""
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

    def run(worker: Worker, steps: range) -> Worker:
        for step in steps:
            worker.optimizer.zero_grad()
            worker.ddp(step, worker.rank).backward()
            worker.optimizer.step()
        return worker

    def body(rank: Rank) -> None:
        def make(chosen: Callable[[Tensor], Tensor]) -> Worker:
            return worker(rank, lambda: Strided(chosen), density=density, sgd=sgd)

        usual, other = run(make(torch.clone), range(3)), run(make(lay), range(3))
        assert other.ddp.module.weights[0].stride() != usual.ddp.module.weights[0].stride()
        assert same(other.parameters(), usual.parameters())
        mine, theirs = usual.state.state_dict()["residuals"], other.state.state_dict()["residuals"]
        for name in mine:
            assert torch.equal(mine[name]["v"], theirs[name]["v"])
            assert torch.equal(mine[name]["u"], theirs[name]["u"])

        crossed = make(lay)
        crossed.ddp.module.load_state_dict(usual.ddp.module.state_dict())
        crossed.state.load_state_dict(usual.state.state_dict())
        assert same(run(crossed, range(3, 6)).parameters(), run(usual, range(3, 6)).parameters())

    run_ranks(2, body)


@pytest.mark.parametrize("lay", [torch.clone, *LAYS.values()], ids=["contiguous", *LAYS])
def test_momentum_gathered_before_compress_is_taken_over_in_any_memory_format(lay: Callable[[Tensor], Tensor]) -> None:
    def body(rank: Rank) -> None:
        plain, late = (worker(rank, lambda: Strided(lay), density=None) for _ in range(2))
        for step in range(4):
            if step == 2:
                distrobust.compress(late.ddp, late.optimizer, density=1.0)
            for one in (plain, late):
                one.optimizer.zero_grad()
                one.ddp(step, rank.rank).backward()
                one.optimizer.step()
        assert same(plain.parameters(), late.parameters())

    run_ranks(2, body)


class Whole(nn.Linear):
    """Gradients of whole numbers, which add up without rounding in any order."""

    def __init__(self) -> None:
        super().__init__(20, 30)


@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize("view", [False, True])
def test_no_sync_accumulation_equals_one_big_batch(density: float, view: bool) -> None:
    """To the bit, with whole numbers for gradients."""

    def body(rank: Rank) -> None:
        parts, whole = (worker(rank, Whole, density=density, ddp={"gradient_as_bucket_view": view}) for _ in range(2))
        for step in range(4):
            g = torch.Generator().manual_seed(10 * step + rank.rank)
            x = torch.randint(-4, 5, (9, 20), generator=g).float()
            y = torch.randint(-4, 5, (9, 30), generator=g).float()
            parts.optimizer.zero_grad()
            with parts.ddp.no_sync():
                for start in (0, 3):
                    (parts.ddp(x[start : start + 3]) * y[start : start + 3]).sum().backward()
            (parts.ddp(x[6:]) * y[6:]).sum().backward()
            parts.optimizer.step()
            whole.optimizer.zero_grad()
            (whole.ddp(x) * y).sum().backward()
            whole.optimizer.step()
            assert same(parts.parameters(), whole.parameters())
        assert same(residuals(parts.state), residuals(whole.state))
        assert parts.state.step == 4

    run_ranks(2, body)


class Branches(nn.Module):
    """`left` and `right` are used on request; `trunk` always. Both branches hold a large and a small tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = (nn.Linear(20, 20) for _ in range(3))

    def forward(self, x: Tensor, branches: str) -> Tensor:
        h = self.trunk(x)
        return sum(getattr(self, name)(h).square().mean() for name in branches.split()) + h.mean()


def step_on_branches(worker: Worker, step: int, branches: str) -> None:
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(10 * step + worker.rank))
    worker.optimizer.zero_grad()
    worker.ddp(x, branches).backward()
    worker.optimizer.step()


def of(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith(name)}


@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize("bucket_cap_mb", [1e-3, 25])
def test_a_parameter_no_rank_used_keeps_its_residual_and_momentum_to_the_bit(
    density: float, bucket_cap_mb: float
) -> None:
    def body(rank: Rank) -> None:
        ddp = {"find_unused_parameters": True, "bucket_cap_mb": bucket_cap_mb}
        ours = worker(rank, Branches, density=density, ddp=ddp)
        for step in range(3):
            step_on_branches(ours, step, "left right")
        parameters, kept = ours.parameters(), residuals(ours.state)
        assert any(bool(value.any()) for value in of("right", kept).values())
        for step in range(3, 6):
            step_on_branches(ours, step, "left")
            assert same(of("right", ours.parameters()), of("right", parameters))
            assert same(of("right", residuals(ours.state)), of("right", kept))
            assert ours.ddp.module.right.weight.grad is None
        assert not same(of("left", ours.parameters()), of("left", parameters))
        step_on_branches(ours, 6, "left right")
        assert not same(of("right", ours.parameters()), of("right", parameters))

    run_ranks(2, body)


def test_a_parameter_no_rank_used_keeps_its_residual_over_the_step_that_turns_dense() -> None:
    def body(rank: Rank) -> None:
        ours = worker(rank, Branches, density=0.05, ddp={"find_unused_parameters": True})
        for step in range(3):
            step_on_branches(ours, step, "left right")
        kept, parameters = residuals(ours.state), ours.parameters()
        ours.state.density = Schedule(1.0)
        step_on_branches(ours, 3, "left")
        assert same(of("right", residuals(ours.state)), of("right", kept))
        assert not ours.state.residuals["left.weight"].v.any()
        step_on_branches(ours, 4, "left right")
        assert not ours.state.residuals["right.weight"].v.any()
        assert not same(of("right", ours.parameters()), of("right", parameters))

    run_ranks(2, body)


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_a_parameter_used_on_one_rank_is_updated_on_all(density: float) -> None:
    def body(rank: Rank) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ours = worker(rank, Branches, density=density, ddp={"find_unused_parameters": True})
        start = ours.parameters()
        for step in range(4):
            step_on_branches(ours, step, "left right" if rank.rank == step % 2 else "left")
        return start, ours.parameters()

    (start, first), (_, second) = run_ranks(2, body)
    assert same(first, second)
    assert not torch.equal(first["right.weight"], start["right.weight"])


def test_a_parameter_used_on_one_rank_equals_ddp_with_sgd_in_a_dense_phase() -> None:
    def body(rank: Rank) -> None:
        plain, ours = (
            worker(rank, Branches, density=density, ddp={"find_unused_parameters": True}) for density in (None, 1.0)
        )
        for step in range(4):
            for one in (plain, ours):
                step_on_branches(one, step, "left right" if rank.rank == step % 2 else "left")
            assert same(plain.parameters(), ours.parameters())

    run_ranks(2, body)


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_static_graph_with_a_parameter_nobody_ever_uses(density: float) -> None:
    def body(rank: Rank) -> None:
        static, finding = (
            worker(rank, Branches, density=density, ddp={"bucket_cap_mb": 1e-3, mode: True})
            for mode in ("static_graph", "find_unused_parameters")
        )
        start = static.parameters()
        for step in range(5):
            step_on_branches(static, step, "left")
            step_on_branches(finding, step, "left")
        assert same(static.parameters(), finding.parameters())
        assert same(of("right", static.parameters()), of("right", start))
        assert not any(bool(value.any()) for value in of("right", residuals(static.state)).values())

    run_ranks(2, body)
