"""One exchanged backward a step: what else would reach the exchange twice is refused before it does."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import Worker, batch, mlp, residuals, same, seeded, worker
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distrobust
from distrobust.errors import ConfigError

pytestmark = pytest.mark.ranks
REFUSAL = r"neither stepped on nor cleared, .*`with model.no_sync\(\):` for all but the last micro-batch, or call zero"


def loss_of(ours: Worker, step: int, model: Callable[..., Any] | None = None) -> torch.Tensor:
    x, y = batch(step, ours.rank)
    return nn.functional.cross_entropy((ours.ddp if model is None else model)(x), y)


@pytest.mark.parametrize("density", [0.02, 1.0])
@pytest.mark.parametrize("views", [False, True])
def test_accumulating_without_no_sync_is_refused_and_leaves_no_trace(density: float, views: bool) -> None:
    def body(rank: Rank) -> None:
        ours, twin = (worker(rank, density=density, ddp={"gradient_as_bucket_view": views}) for _ in range(2))
        for one in (ours, twin):
            one.step(0)
            one.backward(1)
        for _ in range(2):
            with pytest.raises(ConfigError, match=REFUSAL):
                loss_of(ours, 2)
        with pytest.raises(ConfigError, match=REFUSAL), ours.ddp.no_sync():
            loss_of(ours, 2)  # the exchanged one must be the last
        for one in (ours, twin):
            one.optimizer.step()
        assert ours.state.step == 2
        assert same(ours.parameters(), twin.parameters())
        assert same(residuals(ours.state), residuals(twin.state))

    run_ranks(2, body)


def thrown_away(ours: Worker) -> None:
    """As after a gradient that a loop found too large."""
    ours.backward(1)
    ours.optimizer.zero_grad()


def zeroed(ours: Worker) -> None:
    ours.backward(1)
    ours.optimizer.zero_grad(set_to_none=False)


def accumulated(ours: Worker) -> None:
    ours.optimizer.zero_grad()
    with ours.ddp.no_sync():
        loss_of(ours, 1).backward()
    loss_of(ours, 2).backward()
    ours.optimizer.step()


def cleared_late(ours: Worker) -> None:
    """zero_grad() between forward and backward, as many loops do."""
    for step in (1, 2):
        loss = loss_of(ours, step)
        ours.optimizer.zero_grad()
        loss.backward()
        ours.optimizer.step()


def skipped(ours: Worker) -> None:
    (math.nan * loss_of(ours, 1)).backward()  # no zero_grad, no step


def skipped_by_a_scaler_alone(ours: Worker) -> None:
    """The mean is finite, and overflows only where it is written: in half precision."""
    ours.backward(1)
    for p in ours.ddp.parameters():
        assert p.grad is not None
        p.grad.fill_(math.inf)


def looked_at(ours: Worker) -> None:
    """Evaluation between backward and step, as for a line search."""
    ours.backward(1)
    with torch.no_grad():
        loss_of(ours, 2)
    ours.ddp.eval()
    loss_of(ours, 2)
    ours.ddp.train()
    ours.optimizer.step()


def in_a_closure(ours: Worker) -> None:
    """Lightning's order: forward, zero_grad and backward inside step()."""

    def closure() -> torch.Tensor:
        loss = loss_of(ours, 1)
        ours.optimizer.zero_grad()
        loss.backward()
        return loss

    for _ in range(2):
        ours.optimizer.step(closure)  # type: ignore[arg-type]


FLOWS = [thrown_away, zeroed, accumulated, cleared_late, skipped, skipped_by_a_scaler_alone, looked_at, in_a_closure]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.__name__)
@pytest.mark.parametrize("density", [0.02, 1.0])
def test_what_exchanges_once_a_step_passes(flow: Callable[[Worker], None], density: float) -> None:
    def body(rank: Rank) -> None:
        ours = worker(rank, density=density)
        ours.step(0)
        flow(ours)
        loss_of(ours, 3)
        ours.step(4)

    run_ranks(2, body)


def test_a_compiled_wrapper_trains_and_refuses_alike() -> None:
    """On one rank: the compiler is not made for threads."""

    def body(rank: Rank) -> None:
        ours, usual = worker(rank), worker(rank)
        model = torch.compile(ours.ddp, backend="eager")
        for step in range(3):
            ours.optimizer.zero_grad()
            loss_of(ours, step, model).backward()
            ours.optimizer.step()
            usual.step(step)
        assert same(ours.parameters(), usual.parameters())
        ours.backward(1)
        with pytest.raises(ConfigError, match=REFUSAL):
            loss_of(ours, 2, model)
        ours.optimizer.step()
        loss_of(ours, 2, model).backward()

    run_ranks(1, body)


def test_a_scaler_that_skips_its_steps_passes() -> None:
    def body(rank: Rank) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        ours = worker(rank, scaler=scaler)
        for step in range(4):
            loss = loss_of(ours, step)
            ours.optimizer.zero_grad()
            scaler.scale(1e3 * loss).backward()
            scaler.step(ours.optimizer)
            scaler.update()
        assert ours.state.skipped_steps > 0

    run_ranks(2, body)


def test_a_step_of_one_of_several_optimizers_is_a_step() -> None:
    def body(rank: Rank) -> None:
        ddp = DistributedDataParallel(seeded(mlp), process_group=rank.group)
        parameters = list(ddp.parameters())
        halves = [torch.optim.SGD(half, lr=0.1, momentum=0.9) for half in (parameters[:2], parameters[2:])]
        ours = Worker(ddp, halves[0], distrobust.compress(ddp, halves, 0.02), rank.rank)
        for step in range(4):
            ddp.zero_grad()
            loss_of(ours, step).backward()
            halves[step % 2].step()
        ddp.zero_grad()
        loss_of(ours, 4).backward()
        with pytest.raises(ConfigError, match=REFUSAL):
            loss_of(ours, 5)

    run_ranks(2, body)
