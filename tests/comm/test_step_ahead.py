"""Step-ahead error feedback: gradients are computed where a rank's own unsent update will lead."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import SGD, Worker, batch, mlp, residuals, same, seeded, worker
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distrobust
from distrobust.compression.select import num_selected
from distrobust.errors import ConfigError
from distrobust.optim.adaptive import NoiseAdaptive

pytestmark = pytest.mark.ranks
DENSITY, STEPS = 0.05, 6
AHEAD: dict[str, Any] = {"density": DENSITY, "step_ahead": True, "values": "fp32", "fuse_below": 0}


def simulated(num_ranks: int) -> dict[str, Tensor]:
    """The same steps without DDP or hook, written from the definition, in float64."""
    net = seeded(mlp).double()
    names = [name for name, _ in net.named_parameters()]
    w = {name: p.detach().clone() for name, p in net.named_parameters()}
    u = [{name: torch.zeros_like(w[name]) for name in names} for _ in range(num_ranks)]
    v = [{name: torch.zeros_like(w[name]) for name in names} for _ in range(num_ranks)]
    share = min(1.0, 2 / num_ranks)
    for step in range(STEPS):
        mean = {name: torch.zeros_like(w[name]) for name in names}
        for rank in range(num_ranks):
            ahead = {name: (w[name] - SGD["lr"] * share * v[rank][name]).requires_grad_() for name in names}
            x, y = batch(step, rank)
            loss = nn.functional.cross_entropy(torch.func.functional_call(net, ahead, x.double()), y)
            for name, g in zip(names, torch.autograd.grad(loss, list(ahead.values())), strict=True):
                g = g + SGD["weight_decay"] * ahead[name].detach()
                u[rank][name] = SGD["momentum"] * u[rank][name] + g
                v[rank][name] += u[rank][name]
                flat = v[rank][name].view(-1)
                sent = flat.abs().topk(num_selected(flat.numel(), DENSITY)).indices
                mean[name].view(-1)[sent] += flat[sent] / num_ranks
                flat[sent] = 0.0
        for name in names:
            w[name] = w[name] - SGD["lr"] * mean[name]
    return w


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_training_follows_the_definition(num_ranks: int) -> None:
    """float32 against float64: 6 steps of sums of some hundred terms of order 1, 1e-5 with room."""

    def body(rank: Rank) -> dict[str, Tensor]:
        ours = worker(rank, **AHEAD)
        for step in range(STEPS):
            ours.step(step)
        return ours.parameters()

    expected = simulated(num_ranks)
    for parameters in run_ranks(num_ranks, body):
        for name, values in parameters.items():
            assert torch.allclose(values.double(), expected[name], rtol=0, atol=1e-5), name


def trained(rank: Rank, steps: int = 4, **options: Any) -> Worker:
    ours = worker(rank, **{**AHEAD, **options})
    for step in range(steps):
        ours.step(step)
    return ours


def test_between_steps_every_rank_holds_the_same_parameters_to_the_bit() -> None:
    first, *others = run_ranks(3, lambda rank: trained(rank).parameters())
    assert all(same(first, other) for other in others)


def assert_ahead(ours: Worker, step: int, rates: dict[str, float], share: float) -> None:
    """The forward of `step` sees w - rate * share * v, to the bit, and the backward ends at w."""
    shared, kept = ours.parameters(), residuals(ours.state)
    x, y = batch(step, ours.rank)
    ours.optimizer.zero_grad()
    loss = nn.functional.cross_entropy(ours.ddp(x), y)
    for name, p in ours.ddp.module.named_parameters():
        v = kept[f"{name}.v"].view_as(p)
        assert v.any()
        assert torch.equal(p.detach(), shared[name].add(v, alpha=-rates[name] * share)), name
    loss.backward()
    assert same(ours.parameters(), shared)


def test_parameters_move_ahead_for_a_training_forward_and_are_back_after_backward() -> None:
    def body(rank: Rank) -> None:
        ours = trained(rank)
        assert_ahead(ours, 4, dict.fromkeys(ours.state.parameters, SGD["lr"]), share=1.0)

    run_ranks(2, body)


def with_groups(parameters: Iterator[nn.Parameter]) -> torch.optim.SGD:
    first, *others = parameters
    return torch.optim.SGD([{"params": others}, {"params": [first], "lr": 0.05}], **SGD)


@pytest.mark.parametrize(("num_ranks", "share"), [(2, 1.0), (5, 0.4)])
def test_the_shift_takes_the_rate_of_now(num_ranks: int, share: float) -> None:
    """A schedule changes it between steps; v is in units of a gradient and knows no rate. Groups have rates of their
    own.
    """

    def body(rank: Rank) -> None:
        ours = trained(rank, optimizer=with_groups)
        for step, (rate, first) in enumerate([(0.1, 0.05), (0.02, 0.3), (0.4, 0.0)], start=4):
            for group, lr in zip(ours.optimizer.param_groups, (rate, first), strict=True):
                group["lr"] = lr
            rates = dict.fromkeys(ours.state.parameters, rate) | {"0.weight": first}
            assert_ahead(ours, step, rates, share)
            ours.optimizer.step()

    run_ranks(num_ranks, body)


@pytest.mark.parametrize("leave", ["state_dict", "evaluation", "optimizer step"])
def test_a_forward_without_backward_does_not_leave_them_ahead(leave: str) -> None:
    def body(rank: Rank) -> None:
        ours = trained(rank)
        shared = ours.parameters()
        x, _ = batch(4, rank.rank)
        ours.ddp(x)
        ours.optimizer.zero_grad()
        if leave == "state_dict":
            ours.state.state_dict()
        elif leave == "evaluation":
            ours.ddp.eval()
            ours.ddp(x)
        else:
            ours.optimizer.step()
        assert same(ours.parameters(), shared)

    run_ranks(2, body)


def test_a_skipped_step_leaves_the_shared_parameters() -> None:
    def body(rank: Rank) -> None:
        ours = trained(rank)
        shared, kept = ours.parameters(), residuals(ours.state)
        x, y = batch(4, rank.rank)
        ours.optimizer.zero_grad()
        scale = torch.nan if rank.rank == 1 else 1.0
        (nn.functional.cross_entropy(ours.ddp(x), y) * scale).backward()
        ours.optimizer.step()
        assert ours.state.skipped
        assert same(ours.parameters(), shared)
        assert same(residuals(ours.state), kept)

    run_ranks(2, body)


def test_a_dense_phase_is_the_same_with_and_without() -> None:
    with_it, without = (
        run_ranks(2, lambda rank, on=on: trained(rank, density=1.0, step_ahead=on).parameters())[0]  # type: ignore[misc]
        for on in (True, False)
    )
    assert same(with_it, without)


def test_masking_and_warmup_are_off_unless_asked_for() -> None:
    def body(rank: Rank) -> None:
        ours = worker(rank, density=0.001, step_ahead=True, num_steps=100)
        assert not any(r.rule.masking for r in ours.state.residuals.values())
        assert ours.state.density.at(0) == 0.001

    run_ranks(2, body)


def test_the_last_steps_can_be_denser() -> None:
    def body(rank: Rank) -> None:
        state = worker(rank, num_steps=10, final_steps=2, final_density=0.5, **AHEAD).state
        assert [state.density_at(step) for step in (7, 8, 9, 10)] == [DENSITY, 0.5, 0.5, DENSITY]

    run_ranks(2, body)


def test_a_sharded_exchange_is_refused() -> None:
    def body(rank: Rank) -> None:
        with pytest.raises(ConfigError, match=r"step_ahead: .*must be its own.*all_gather"):
            worker(rank, exchange="sharded", **AHEAD)

    run_ranks(2, body)


def test_an_optimizer_whose_update_is_not_the_rate_times_the_residual_is_refused() -> None:
    class MySgd(torch.optim.SGD):
        """Its step may do anything."""

    def body(rank: Rank) -> None:
        for kind in (torch.optim.AdamW, MySgd):
            with pytest.raises(
                ConfigError, match=rf"step_ahead: got optimizer {kind.__name__}, wanted torch.optim.SGD"
            ):
                worker(rank, optimizer=lambda p, kind=kind: kind(p, lr=0.01), momentum="optimizer", **AHEAD)
        worker(rank, momentum="optimizer", **AHEAD).step(0)

    run_ranks(2, body)


def test_sgd_at_rates_that_follow_the_noise_steps_ahead() -> None:
    """Every layer by its own rate: the group's times the ratio of the last step."""

    def body(rank: Rank) -> None:
        net = seeded(mlp)
        ddp = DistributedDataParallel(net, process_group=rank.group)
        optimizer = NoiseAdaptive(torch.optim.SGD(net.parameters(), lr=0.1), ddp)
        state = distrobust.compress(ddp, optimizer, momentum="optimizer", **AHEAD)
        ours = Worker(ddp, optimizer, state, rank.rank)
        for step in range(3):
            ours.step(step)
        for step, rate in enumerate([0.1, 0.03], start=3):
            optimizer.param_groups[0]["lr"] = rate
            assert len(set(optimizer.ratios.values())) > 2
            assert_ahead(ours, step, {name: rate * ratio for name, ratio in optimizer.ratios.items()}, share=0.5)
            optimizer.step()

    run_ranks(4, body)
