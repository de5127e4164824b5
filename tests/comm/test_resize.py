"""Another number of ranks: nothing that waits in the residuals is lost."""

from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import CLASSES, INPUTS, Worker, mlp, seeded, worker
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import distrobust
from distrobust.errors import CheckpointError

pytestmark = pytest.mark.ranks


def made_up(num_ranks: int, settled: bool = False) -> list[dict[str, Any]]:
    """States with integers in them, so that sums are exact."""
    g = torch.Generator().manual_seed(num_ranks)
    momentum = torch.randint(-60, 60, (3, 4), generator=g).float()

    def of(rank: int) -> dict[str, Any]:
        v = torch.zeros(3, 4) if settled else torch.randint(-60, 60, (3, 4), generator=g).float()
        u = momentum if settled else torch.randint(-60, 60, (3, 4), generator=g).float()
        place = {"rank": rank, "num_ranks": num_ranks, "num_local": 1, "local_rank": 0}
        counts = {"step": 7, "skipped_steps": 1, "skipped_in_a_row": 0, "sent_bytes": 10 + rank, "dense_bytes": 100}
        return {"residuals": {"w": {"v": v, "u": u, "settled": settled}}, **place, **counts}

    return [of(rank) for rank in range(num_ranks)]


def mass(states: list[dict[str, Any]], key: str) -> Tensor:
    return torch.stack([s["residuals"]["w"][key].double() for s in states]).sum(dim=0) / len(states)


@given(st.integers(1, 9), st.integers(1, 9))
def test_the_mass_that_waits_is_conserved(before: int, after: int) -> None:
    """Each value is scaled once and rounded once, at most 60 * 9: half an ulp of that, summed over ranks."""
    old = made_up(before)
    new = [distrobust.resize(old, rank, after) for rank in range(after)]
    for key in ("u", "v"):
        assert torch.allclose(mass(new, key), mass(old, key), rtol=0, atol=after * 540 * 2.0**-24)
    assert [(s["rank"], s["num_ranks"]) for s in new] == [(rank, after) for rank in range(after)]


@given(st.integers(1, 9), st.integers(1, 9))
def test_after_a_dense_step_every_rank_has_the_same_velocity_still(before: int, after: int) -> None:
    old = made_up(before, settled=True)
    for rank in range(after):
        entry = distrobust.resize(old, rank, after)["residuals"]["w"]
        assert entry["settled"]
        assert torch.equal(entry["u"], old[0]["residuals"]["w"]["u"])


def test_the_same_number_of_ranks_changes_nothing() -> None:
    old = made_up(3)
    assert all(distrobust.resize(old, rank, 3) is old[rank] for rank in range(3))


def test_a_new_rank_starts_from_zero_and_counts_its_own_bytes() -> None:
    new = distrobust.resize(made_up(2), 2, 3)
    assert not new["residuals"]["w"]["v"].any()
    assert (new["sent_bytes"], new["step"]) == (0, 7)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda states: states.reverse(), "got rank 1 of 2 at step 7 in place 0 of 2"),
        (lambda states: states.pop(), "got rank 0 of 2 at step 7 in place 0 of 1"),
        (lambda states: states[1].update(step=8), "at step 8 in place 1 of 2.*at step 7"),
        (lambda states: states[0].update(num_local=2), "hierarchical"),
    ],
    ids=["order", "one missing", "another step", "pieces"],
)
def test_what_is_not_all_ranks_of_one_run_is_refused(change: Any, text: str) -> None:
    states = made_up(2)
    change(states)
    with pytest.raises(CheckpointError, match=text):
        distrobust.resize(states, 0, 3)


GLOBAL_BATCH = 24
TEACHER = seeded(mlp, seed=99)


def train(ours: Worker, rank: Rank, steps: range, seed: int) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(100_000 * seed + step)
        x = torch.randn(GLOBAL_BATCH, INPUTS, generator=g)[rank.rank :: rank.num_ranks]
        ours.optimizer.zero_grad()
        nn.functional.cross_entropy(ours.ddp(x), TEACHER(x).argmax(1)).backward()
        ours.optimizer.step()


def final_loss(phases: list[int], seed: int) -> float:
    """Loss on held-out inputs after 25 steps with each of these numbers of ranks."""
    weights: dict[str, Tensor] = seeded(mlp).state_dict()
    states: list[dict[str, Any]] = []
    for phase, num_ranks in enumerate(phases):

        def body(rank: Rank, phase: int = phase, weights: Any = weights, states: Any = tuple(states)) -> Any:
            ours = worker(rank, density=0.05, exchange="all_gather")
            ours.ddp.module.load_state_dict(weights)
            if states:
                ours.state.load_state_dict(distrobust.resize(list(states), rank.rank, rank.num_ranks))
            train(ours, rank, range(25 * phase, 25 * phase + 25), seed)
            return ours.parameters(), ours.state.state_dict()

        results = run_ranks(num_ranks, body)
        weights, states = results[0][0], [state for _, state in results]
    net = seeded(mlp)
    net.load_state_dict(weights)
    x = torch.randn(2000, INPUTS, generator=torch.Generator().manual_seed(5))
    assert len({int(c) for c in TEACHER(x).argmax(1)}) >= CLASSES - 2
    with torch.no_grad():
        return float(nn.functional.cross_entropy(net(x), TEACHER(x).argmax(1)))


def test_a_run_of_four_then_two_then_three_ranks_ends_within_noise_of_an_uninterrupted_one() -> None:
    """Noise: four seeds of the uninterrupted run. Student's t for 99 % and 3 degrees of freedom is 5.84."""
    whole = torch.tensor([final_loss([4, 4, 4], seed) for seed in range(4)])
    resized = torch.tensor([final_loss([4, 2, 3], seed) for seed in range(2)])
    assert float(whole.mean()) < 1.8  # it learns: log(10) is 2.3
    assert bool(((resized - whole.mean()).abs() < 5.84 * whole.std() * (1 + 1 / 4) ** 0.5).all()), (whole, resized)
