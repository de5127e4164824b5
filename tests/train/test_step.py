"""One training step on several ranks: whatever it does to the weights inside, between steps they are shared."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from distrobust.config import AttackConfig
from distrobust.optim.schedules import Schedule
from distrobust.train.state import TrainState
from distrobust.train.step import Recipe, train_step
from tests.harness.jobs import assert_equal
from tests.harness.ranks import Rank, run_ranks
from tests.train.test_transfer import PHASE, RECIPE, state_of


@pytest.mark.ranks
@pytest.mark.parametrize("step_ahead", [False, True])
@pytest.mark.parametrize("awp", [None, 0.005])
def test_after_a_step_all_ranks_hold_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, awp: float | None, step_ahead: bool
) -> None:
    monkeypatch.setattr(TrainState, "attacked", lambda state, _: state.net)  # threads cannot trace a model at once
    attack = AttackConfig.model_validate({"name": "fgsm", "eps": 0.05, "awp": awp})
    phase = PHASE.model_copy(update={"accumulate": 2})
    recipe: Recipe = dataclasses.replace(RECIPE, attack=attack, phase=phase)

    def body(rank: Rank) -> dict[str, Tensor]:
        state = state_of(rank, None, density=0.05, step_ahead=step_ahead, warmup=0.0)
        for number in range(4):
            generator = torch.Generator().manual_seed(10 * number + rank.rank)
            images = torch.randint(0, 256, (8, 1, 8, 8), generator=generator, dtype=torch.uint8)
            train_step(state, images, torch.arange(8) % 4, recipe, rank.rank)
            state.position = dataclasses.replace(state.position, step=number + 1)
        assert any(residual.v.any() for residual in state.compression.residuals.values())  # something waits
        return {name: p.detach().clone() for name, p in state.net.named_parameters()}

    one, two = run_ranks(2, body)
    assert_equal(one, two)


@pytest.mark.ranks
def test_micro_batches_are_one_exchange_of_the_same_examples() -> None:
    def body(rank: Rank, num: int) -> tuple[list[Tensor], Tensor, list[int]]:
        state = state_of(rank, None, density=0.05, warmup=0.0)
        recipe = dataclasses.replace(RECIPE, phase=PHASE.model_copy(update={"accumulate": num}))
        seen: list[Tensor] = []
        state.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        generator = torch.Generator().manual_seed(rank.rank)
        images = torch.randint(0, 256, (8, 1, 8, 8), generator=generator, dtype=torch.uint8)
        train_step(state, images, torch.arange(8) % 4, recipe, rank.rank)
        return seen, images, [state.compression.step, state.compression.sent_bytes, state.compression.dense_bytes]

    whole, parts = (run_ranks(2, functools.partial(body, num=num)) for num in (1, 4))
    for (_, _, once), (seen, images, counts) in zip(whole, parts, strict=True):
        assert counts == once
        assert min(counts) > 0
        assert [len(one) for one in seen] == [2] * 4
        assert torch.equal(torch.cat(seen), images.float() / 255)


@pytest.mark.ranks
def test_the_job_steps_ahead_by_the_rate_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """w moves by - rate of this step x share x v, where the schedule falls."""
    schedule = Schedule("cosine", 0.125, warmup=0.0)
    recipe = dataclasses.replace(RECIPE, schedule=schedule)

    def body(rank: Rank) -> list[tuple[float, float]]:
        state = state_of(rank, None, density=0.05, step_ahead=True, values="fp32", warmup=0.0)
        weight, residual = state.net.get_parameter("head.weight"), state.compression.residuals["head.weight"]
        go, moved = state.compression.step_ahead, []

        def watched() -> None:
            before = weight.detach().clone()
            go()
            if residual.v.any() and not torch.equal(before, weight):
                by = ((before - weight.detach()).view(-1) @ residual.v) / (residual.v @ residual.v)
                moved.append((float(by), schedule.at(state.position.step / 8)))

        monkeypatch.setattr(state.compression, "step_ahead", watched)
        for number in range(6):
            generator = torch.Generator().manual_seed(10 * number + rank.rank)
            images = torch.randint(0, 256, (8, 1, 8, 8), generator=generator, dtype=torch.uint8)
            train_step(state, images, torch.arange(8) % 4, recipe, rank.rank)
            state.position = dataclasses.replace(state.position, step=number + 1)
        return moved

    for moved in run_ranks(2, body):
        assert len(moved) == 5
        assert len({rate for _, rate in moved}) == 5
        for by, rate in moved:
            assert by == pytest.approx(rate, rel=1e-3)
