"""Saving and loading: a run goes on bit-identically, and what does not fit is refused and changes nothing."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import SGD, Worker, mlp, residuals, same, worker
from torch import nn

import distrobust
from distrobust.comm import link
from distrobust.comm.link import Link
from distrobust.comm.transport import Transport
from distrobust.errors import CheckpointError

pytestmark = pytest.mark.ranks


COUNTERS = ("step", "sent_bytes", "dense_bytes", "skipped_steps", "skipped_in_a_row")


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("density", [0.02, 1.0])
@pytest.mark.parametrize("momentum", ["residual", "optimizer"])
def test_a_loaded_state_continues_bit_identically(density: float, momentum: str) -> None:
    def body(rank: Rank) -> None:
        def make() -> Worker:
            return worker(
                rank, density=density, momentum=momentum, num_steps=8, warmup=0.75, ddp={"bucket_cap_mb": 1e-3}
            )

        whole, before, after = make(), make(), make()
        for step in range(8):
            whole.step(step)
        for step in range(4):
            before.step(step)
        saved = {
            "model": before.ddp.module.state_dict(),
            "optimizer": before.optimizer.state_dict(),
            "compression": before.state.state_dict(),
        }
        saved = through_a_file(saved)
        counters = {name: getattr(before.state, name) for name in COUNTERS}
        before.step(4)  # what was saved is a copy
        after.ddp.module.load_state_dict(saved["model"])
        after.optimizer.load_state_dict(saved["optimizer"])
        after.state.load_state_dict(saved["compression"])
        assert counters == {name: getattr(after.state, name) for name in COUNTERS}
        for step in range(4, 8):
            after.step(step)
        assert same(after.parameters(), whole.parameters())
        assert same(residuals(after.state), residuals(whole.state))

    run_ranks(2, body)


def test_loading_tells_settled_residuals_from_others() -> None:
    """A dense phase after a restart must still empty the residuals of the sparse one before it."""

    def body(rank: Rank) -> None:
        ours, other = worker(rank), worker(rank)
        ours.step(0)
        other.state.load_state_dict(through_a_file(ours.state.state_dict()))
        other.ddp.module.load_state_dict(ours.ddp.module.state_dict())
        for one in (ours, other):
            one.state.density = type(one.state.density)(1.0)
            one.step(1)
        assert same(ours.parameters(), other.parameters())
        assert not any(bool(residual.v.any()) for residual in other.state.residuals.values())

    run_ranks(2, body)


def _wider() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 55), nn.Tanh(), nn.Linear(55, 11))


def _deeper() -> nn.Module:
    return nn.Sequential(*mlp(), nn.Tanh(), nn.Linear(10, 10))


Change = Callable[[dict[str, Any]], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "rank": (lambda state: state.update(rank=1), "residual of rank 1 of 2, this is rank 0 of 2"),
    "world size": (lambda state: state.update(num_ranks=4), "rank 0 of 4, this is rank 0 of 2.*distrobust.resize"),
    "a parameter is missing": (
        lambda state: state["residuals"].pop("2.bias"),
        "residuals of another model: 1 parameters differ, first '2.bias'",
    ),
    "another shape": (
        lambda state: state["residuals"]["4.bias"].update(v=torch.ones(3)),
        r"residual of '4.bias': got shape \(3,\), wanted \(10,\)",
    ),
    "the last parameter has no momentum": (
        lambda state: state["residuals"]["4.bias"].pop("u"),
        "residual of '4.bias': saved without momentum, this run is with it",
    ),
    "another weight decay": (
        lambda state: state["rules"].update({"4.bias": (0.9, False, 0.1)}),
        "residual of '4.bias': saved with momentum 0.9, nesterov False, weight decay 0.1, this run has momentum 0.9, "
        r"nesterov False, weight decay 0.0005: call compress\(\) on a fresh optimizer, then load the states of both",
    ),
    "something else": (lambda state: state.clear(), r"not what Compression.state_dict\(\) returned"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: Change, message: str) -> None:
    def body(rank: Rank) -> None:
        ours = worker(rank)
        ours.step(0)
        foreign = ours.state.state_dict()
        ours.step(1)
        before, counters = residuals(ours.state), (ours.state.step, ours.state.sent_bytes)
        if rank.rank == 0:
            change(foreign)
            with pytest.raises(CheckpointError, match=message):
                ours.state.load_state_dict(foreign)
        assert same(residuals(ours.state), before)
        assert (ours.state.step, ours.state.sent_bytes) == counters

    run_ranks(2, body)


@pytest.mark.parametrize("build", [_wider, _deeper])
def test_the_state_of_another_model_is_refused(build: Callable[[], nn.Module]) -> None:
    def body(rank: Rank) -> None:
        with pytest.raises(CheckpointError, match=r"of another model|got shape"):
            worker(rank).state.load_state_dict(worker(rank, build).state.state_dict())

    run_ranks(1, body)


@pytest.mark.parametrize(("saved", "running"), [(0.9, 0.0), (0.0, 0.9)])
def test_the_state_of_another_momentum_setting_is_refused(saved: float, running: float) -> None:
    def body(rank: Rank) -> None:
        first, second = (worker(rank, sgd={"lr": 0.1, "momentum": momentum}) for momentum in (saved, running))
        with pytest.raises(CheckpointError, match="momentum"):
            second.state.load_state_dict(first.state.state_dict())

    run_ranks(1, body)


def test_the_saved_state_is_not_changed_by_loading_or_training_on() -> None:
    def body(rank: Rank) -> None:
        ours = worker(rank)
        ours.step(0)
        saved = ours.state.state_dict()
        kept = copy.deepcopy(saved)
        ours.state.load_state_dict(saved)
        ours.step(1)
        for name, entry in kept["residuals"].items():
            assert torch.equal(entry["v"], saved["residuals"][name]["v"])
            assert torch.equal(entry["u"], saved["residuals"][name]["u"])

    run_ranks(1, body)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_optimizer_that_was_loaded_before_compress_is_refused_since_it_has_lost_its_weight_decay(
    momentum: float,
) -> None:
    def body(rank: Rank) -> None:
        ours = worker(rank, sgd={**SGD, "momentum": momentum})
        ours.step(0)
        optimizer, state = ours.optimizer.state_dict(), through_a_file(ours.state.state_dict())
        late = worker(rank, density=None, sgd={**SGD, "momentum": momentum})
        late.optimizer.load_state_dict(optimizer)
        compression = distrobust.compress(late.ddp, late.optimizer)
        with pytest.raises(CheckpointError, match=r"weight decay 0.0005, this run has .*weight decay 0.0:"):
            compression.load_state_dict(state)
        assert compression.step == 0

    run_ranks(1, body)


def test_a_state_of_before_rules_were_saved_is_loaded() -> None:
    def body(rank: Rank) -> None:
        first, second = worker(rank), worker(rank)
        first.step(0)
        state = first.state.state_dict()
        del state["rules"]
        second.state.load_state_dict(state)
        assert same(residuals(first.state), residuals(second.state))

    run_ranks(1, body)


def test_a_density_found_on_the_link_is_kept_by_the_run_that_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start measures 30 kB/s, all later ones 10 kB/s."""
    measured: dict[int, int] = {}  # by rank, whose threads share the patch

    def measure(transport: Transport, device: torch.device) -> Link:
        measured[transport.rank] = measured.get(transport.rank, 0) + 1
        return Link(30_000.0 if measured[transport.rank] == 1 else 10_000.0, 0.0)

    monkeypatch.setattr(link, "measure", measure)

    def body(rank: Rank) -> None:
        def make(**options: Any) -> Worker:
            return worker(rank, **{"density": "auto", "exchange_s": 0.1, **options})

        first, second = make(), make()
        assert second.state.density_at(0) < first.state.density_at(0) < 1.0
        first.step(0)
        state = through_a_file(first.state.state_dict())
        second.ddp.module.load_state_dict(first.ddp.module.state_dict())
        second.state.load_state_dict(state)
        for one in (first, second):
            one.step(1)
        assert same(first.parameters(), second.parameters())
        assert same(residuals(first.state), residuals(second.state))

        one_rank = {**state, "density": (state["density"][0], 0.1, 1)}  # as resize() leaves it
        older = {key: value for key, value in state.items() if key != "density"}
        for other, options in ((one_rank, {}), (older, {}), (state, {"exchange_s": 0.2}), (state, {"density": 0.02})):
            third = make(**{"exchange_s": None if "density" in options else 0.1, **options})
            found = third.state.density
            third.state.load_state_dict(other)
            assert third.state.density == found

    run_ranks(2, body)
