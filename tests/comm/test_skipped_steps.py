"""A step that must not happen leaves no trace on any rank, and mixed precision keeps residuals unscaled."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import Worker, batch, residuals, same, worker
from torch import Tensor, nn

pytestmark = pytest.mark.ranks


def step_with(worker: Worker, step: int, factor: float = 1.0) -> None:
    """A step whose loss is multiplied by `factor`: NaN and infinity reach every gradient."""
    x, y = batch(step, worker.rank)
    worker.optimizer.zero_grad()
    (factor * nn.functional.cross_entropy(worker.ddp(x), y)).backward()
    worker.optimizer.step()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("density", [0.02, 1.0])
@pytest.mark.parametrize("bucket_cap_mb", [1e-3, 25])
def test_a_non_finite_gradient_on_one_rank_skips_the_step_on_all(
    poison: float, density: float, bucket_cap_mb: float
) -> None:
    def body(rank: Rank) -> dict[str, Tensor]:
        ours = worker(rank, density=density, ddp={"bucket_cap_mb": bucket_cap_mb})
        twin = worker(rank, density=density, ddp={"bucket_cap_mb": bucket_cap_mb})  # never sees the poison
        for step in range(3):
            step_with(ours, step)
            step_with(twin, step)
        parameters, kept, optimizer = (
            ours.parameters(),
            residuals(ours.state),
            copy.deepcopy(ours.optimizer.state_dict()),
        )
        for times in (1, 2):
            step_with(ours, 90 + times, poison if rank.rank == 1 else 1.0)
            assert ours.state.skipped
            assert (ours.state.skipped_steps, ours.state.skipped_in_a_row) == (times, times)
            assert same(ours.parameters(), parameters)
            assert same(residuals(ours.state), kept)
            assert ours.optimizer.state_dict() == optimizer
        step_with(ours, 3)
        step_with(twin, 3)
        assert not ours.state.skipped
        assert (ours.state.skipped_steps, ours.state.skipped_in_a_row, ours.state.step) == (2, 0, 6)
        assert same(ours.parameters(), twin.parameters())
        assert same(residuals(ours.state), residuals(twin.state))
        return ours.parameters()

    first, second = run_ranks(2, body)
    assert same(first, second)


def test_a_single_nan_among_the_small_tensors_is_enough() -> None:
    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.large.sum() + (self.small * x).sum()

    def body(rank: Rank) -> None:
        ours = worker(rank, Poisoned)
        ours.ddp(torch.tensor([1.0, math.nan if rank.rank == 0 else 1.0, 1.0])).backward()
        ours.optimizer.step()
        assert ours.state.skipped
        assert torch.equal(ours.ddp.module.large, torch.ones(5000))
        assert not any(bool(value.any()) for value in residuals(ours.state).values())

    run_ranks(3, body)


def test_a_nan_in_an_early_bucket_reaches_no_selection_in_the_last() -> None:
    """The small tensor's bucket goes first, its coordinates are selected with the last one, which is finite itself."""

    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.middle, self.small = (nn.Parameter(torch.ones(n)) for n in (5000, 300, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.large.sum() + self.middle.sum() + (self.small * x).sum()

    def body(rank: Rank) -> None:
        ours = worker(rank, Poisoned, ddp={"bucket_cap_mb": 1e-3})
        for step in range(3):
            ours.optimizer.zero_grad()
            ours.ddp(torch.full((3,), math.nan if rank.rank == 0 else 1.0)).backward()
            ours.optimizer.step()
            assert ours.state.skipped_steps == step + 1
        assert torch.equal(ours.ddp.module.large, torch.ones(5000))

    run_ranks(2, body)


def test_the_step_that_turns_dense_is_skipped_like_any_other() -> None:
    """It reduces residuals, not gradients: they too are as they were."""

    def body(rank: Rank) -> None:
        ours = worker(rank)
        step_with(ours, 0)
        ours.state.density = type(ours.state.density)(1.0)
        parameters, kept = ours.parameters(), residuals(ours.state)
        step_with(ours, 1, math.nan if rank.rank == 0 else 1.0)
        assert ours.state.skipped
        assert same(ours.parameters(), parameters)
        assert same(residuals(ours.state), kept)
        step_with(ours, 2)
        assert not same(ours.parameters(), parameters)
        assert all(residual.settled for residual in ours.state.residuals.values())

    run_ranks(2, body)


ADAPTIVE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


@pytest.mark.parametrize("make", ADAPTIVE.values(), ids=ADAPTIVE.keys())
def test_an_optimizer_with_moments_of_its_own_makes_no_step_either(make: Callable[..., Any]) -> None:
    def body(rank: Rank) -> dict[str, Tensor]:
        ours = worker(rank, optimizer=make, momentum="optimizer")
        for step in range(3):
            step_with(ours, step)
        parameters, state = ours.parameters(), copy.deepcopy(ours.optimizer.state_dict()["state"])
        step_with(ours, 3, math.nan if rank.rank == 1 else 1.0)
        assert same(ours.parameters(), parameters)
        after = ours.optimizer.state_dict()["state"]
        assert all(torch.equal(after[i][key], state[i][key]) for i in state for key in state[i])
        step_with(ours, 4)
        assert not same(ours.parameters(), parameters)
        return ours.parameters()

    first, second = run_ranks(2, body)
    assert same(first, second)


def scaled_step(worker: Worker, scaler: torch.amp.GradScaler, step: int, factor: float = 1.0) -> None:
    x, y = batch(step, worker.rank)
    worker.optimizer.zero_grad()
    scaler.scale(factor * nn.functional.cross_entropy(worker.ddp(x), y)).backward()
    scaler.step(worker.optimizer)
    scaler.update()


@pytest.mark.parametrize("density", [0.02, 1.0])
@pytest.mark.parametrize("options", [{}, {"clip": 0.05}], ids=str)
def test_residuals_are_stored_unscaled_whatever_the_loss_scale_does(density: float, options: dict[str, Any]) -> None:
    """Scales are powers of two and change from step to step; the run is the unscaled one to the bit."""

    def body(rank: Rank) -> None:
        plain = worker(rank, density=density, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        ours = worker(rank, density=density, scaler=scaler, **options)
        for step in range(6):
            step_with(plain, step)
            scaled_step(ours, scaler, step)
        assert scaler.get_scale() == 2.0**15
        assert same(residuals(plain.state), residuals(ours.state))
        assert same(plain.parameters(), ours.parameters())

    run_ranks(2, body)


@pytest.mark.parametrize("density", [0.02, 1.0])
def test_a_step_with_infinite_scaled_gradients_is_skipped_and_the_scale_falls_on_all_ranks(density: float) -> None:
    def body(rank: Rank) -> dict[str, Tensor]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        ours = worker(rank, density=density, scaler=scaler)
        twin = worker(rank, density=density)
        for step in range(2):
            scaled_step(ours, scaler, step)
            step_with(twin, step)
        parameters, kept = ours.parameters(), residuals(ours.state)
        scaled_step(ours, scaler, 2, 3e38 if rank.rank == 0 else 1.0)  # finite, but not times 4,096
        assert ours.state.skipped
        assert same(ours.parameters(), parameters)
        assert same(residuals(ours.state), kept)
        assert scaler.get_scale() == 2.0**11
        scaled_step(ours, scaler, 3)
        step_with(twin, 3)
        assert same(ours.parameters(), twin.parameters())
        return ours.parameters()

    first, second = run_ranks(2, body)
    assert same(first, second)
