"""Momentum and weight decay move out of the optimizer, or compress() refuses and leaves it as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import Worker, mlp, same, worker
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distrobust
from distrobust.errors import ConfigError

pytestmark = pytest.mark.ranks


class MySgd(torch.optim.SGD):
    """Its step may do anything."""


def all_but_one(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(model.parameters())[:-1], lr=0.1, **options)


def and_one_more(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1, **options)


def sgd(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


REFUSED: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], str]] = {
    "AdamW": (
        lambda model: torch.optim.AdamW(model.parameters()),
        r"optimizer AdamW: its first moment cannot be moved.*wanted torch.optim.SGD.*momentum='optimizer'",
    ),
    "RMSprop": (lambda model: torch.optim.RMSprop(model.parameters()), "optimizer RMSprop"),
    "subclass": (lambda model: MySgd(model.parameters(), lr=0.1, momentum=0.9), "optimizer MySgd"),
    "dampening": (sgd(dampening=0.1), r"dampening 0.1 cannot be moved.*set it to 0"),
    "maximize": (sgd(maximize=True), "maximize=True cannot be moved.*negate the loss"),
    "tensor weight decay": (sgd(weight_decay=torch.tensor(0.1)), "must be numbers, not tensors"),
    "one parameter less": (
        lambda model: all_but_one(model, momentum=0.9, weight_decay=0.1),
        r"1 parameters of the model are not in the optimizer, first '4.bias': freeze them",
    ),
    "one parameter more": (
        lambda model: and_one_more(model, momentum=0.9, weight_decay=0.1),
        "1 of its parameters are not exchanged by this model and would lose their momentum",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_moved_is_refused_and_left_as_it_was(
    make: Callable[[nn.Module], torch.optim.Optimizer], message: str
) -> None:
    def body(rank: Rank) -> None:
        ddp = DistributedDataParallel(mlp(), process_group=rank.group)
        optimizer = make(ddp)
        ddp(torch.randn(4, 20)).sum().backward()
        optimizer.step()  # so that there is a momentum buffer to lose
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ConfigError, match=message):
            distrobust.compress(ddp, optimizer)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert after["state"].keys() == before["state"].keys()
        for i, state in before["state"].items():
            assert state.keys() == after["state"][i].keys()
            assert all(value is None or torch.equal(value, after["state"][i][key]) for key, value in state.items())

    run_ranks(1, body)


def test_a_model_that_already_has_a_hook_is_refused_and_the_optimizer_left_as_it_was() -> None:
    def body(rank: Rank) -> None:
        plain = worker(rank, density=None)
        plain.ddp.register_comm_hook(None, _sum)
        with pytest.raises(RuntimeError, match="register_comm_hook"):
            distrobust.compress(plain.ddp, plain.optimizer)
        assert plain.optimizer.param_groups[0]["momentum"] == 0.9
        assert plain.optimizer.param_groups[0]["weight_decay"] == 5e-4

    run_ranks(1, body)


def _sum(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_what_was_moved_is_gone_from_the_optimizer_and_rates_stay() -> None:
    def body(rank: Rank) -> None:
        ddp = DistributedDataParallel(mlp(), process_group=rank.group)
        parameters = list(ddp.parameters())
        groups = [
            {"params": parameters[:2], "lr": 0.3, "nesterov": True},
            {"params": parameters[2:], "momentum": 0.5, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
        ddp(torch.randn(4, 20)).sum().backward()
        optimizer.step()
        state = distrobust.compress(ddp, optimizer)
        for group in optimizer.param_groups:
            assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.0, False, 0.0)
        assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]
        assert not any("momentum_buffer" in entry for entry in optimizer.state.values())
        first, last = state.residuals["0.bias"].rule, state.residuals["4.weight"].rule
        assert (first.momentum, first.nesterov, first.weight_decay) == (0.9, True, 0.01)
        assert (last.momentum, last.nesterov, last.weight_decay) == (0.5, False, 0.0)

    run_ranks(1, body)


def test_frozen_parameters_need_not_be_in_the_optimizer_and_send_nothing() -> None:
    def body(rank: Rank) -> None:
        net = mlp()
        net[0].requires_grad_(False)
        ddp = DistributedDataParallel(net, process_group=rank.group)
        for parameters in ([p for p in net.parameters() if p.requires_grad], net.parameters()):
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
            ddp = DistributedDataParallel(net, process_group=rank.group)
            state = distrobust.compress(ddp, optimizer)
            assert set(state.residuals) == {"2.weight", "2.bias", "4.weight", "4.bias"}

    run_ranks(1, body)


def test_parameters_without_momentum_elsewhere_in_the_optimizer_are_left_alone() -> None:
    """Their group's options stay, and a step moves them by the rate times their gradient."""

    def body(rank: Rank) -> None:
        ddp = DistributedDataParallel(mlp(), process_group=rank.group)
        other = nn.Parameter(torch.ones(3))
        groups = [{"params": ddp.parameters(), "momentum": 0.9}, {"params": [other], "momentum": 0.0, "lr": 0.25}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        before = {key: value for key, value in optimizer.param_groups[1].items() if key != "params"}
        state = distrobust.compress(ddp, optimizer)
        ours = Worker(ddp, optimizer, state, rank.rank)
        for step in range(2):
            ours.backward(step)
            other.grad = torch.tensor([1.0, 2.0, -4.0])
            optimizer.step()
        assert optimizer.param_groups[1] == {**before, "params": [other]}
        assert torch.equal(other, torch.tensor([0.5, 0.0, 3.0]))

    run_ranks(1, body)


def test_momentum_that_comes_back_into_the_optimizer_is_refused_before_it_acts_twice() -> None:
    """OneCycleLR writes the momentum at every step unless told otherwise; so does loading an older optimizer state."""

    def body(rank: Rank) -> None:
        ours = worker(rank)
        old = worker(rank, density=None).optimizer.state_dict()
        before = ours.parameters()
        torch.optim.lr_scheduler.OneCycleLR(ours.optimizer, max_lr=0.1, total_steps=10)
        with pytest.raises(ConfigError, match=r"momentum 0.95 and weight decay 0.0 came back.*cycle_momentum=False"):
            ours.step(0)
        ours.optimizer.load_state_dict(old)
        with pytest.raises(ConfigError, match=r"momentum 0.9 and weight decay 0.0005 came back"):
            ours.step(1)
        assert all(torch.equal(p, before[name]) for name, p in ours.parameters().items())

    run_ranks(1, body)


@pytest.mark.parametrize("density", [0.02, 1.0])
def test_a_schedule_of_the_rate_alone_works(density: float) -> None:
    """Every step is the mean times the rate of that step, and dense ones are those of DDP under the same schedule."""

    def body(rank: Rank) -> None:
        plain, ours = worker(rank, density=None), worker(rank, density=density)
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(one.optimizer, max_lr=0.1, total_steps=6, cycle_momentum=False)
            for one in (plain, ours)
        ]
        rates = []
        for step in range(5):
            before = ours.parameters()
            plain.step(step)
            ours.step(step)
            rates.append(ours.optimizer.param_groups[0]["lr"])
            for name, p in ours.ddp.module.named_parameters():
                assert p.grad is not None
                assert torch.equal(p, before[name].add(p.grad, alpha=-rates[-1]))
            assert same(ours.parameters(), plain.parameters()) == (density == 1.0)
            for schedule in schedules:
                schedule.step()
        assert len(set(rates)) == 5

    run_ranks(1, body)


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "density 0": ({"density": 0.0}, r"compress.density: got 0.0, wanted a fraction above 0 and at most 1"),
    "density below": ({"density": -0.1}, r"compress.density: got -0.1"),
    "density above": ({"density": 1.5}, r"compress.density: got 1.5"),
    "values": ({"values": "fp8"}, r"compress.values: got 'fp8', wanted one of fp32, fp16, bf16"),
    "selector": ({"selector": "Exact"}, r"compress.selector: got 'Exact', wanted one of exact, sampled"),
    "momentum": ({"momentum": "none"}, r"compress.momentum: got 'none', wanted one of residual, optimizer"),
    "warmup": ({"warmup": 1.5}, r"compress.warmup: got 1.5, wanted a share of the run from 0 to 1"),
    "num_steps": ({"num_steps": -10}, r"compress: got -2 warmup_steps"),
    "clip": ({"clip": -1.0}, r"compress.clip: got -1.0, wanted a norm above 0"),
    "ladder": ({"ladder": (0.5, 2.0)}, r"compress.density: got 2.0"),
}


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_an_impossible_option_is_refused_and_the_optimizer_left_as_it_was(
    options: dict[str, Any], message: str
) -> None:
    def body(rank: Rank) -> None:
        plain = worker(rank, density=None)
        with pytest.raises(ConfigError, match=message):
            distrobust.compress(plain.ddp, plain.optimizer, **options)
        assert plain.optimizer.param_groups[0]["momentum"] == 0.9
        with pytest.raises(TypeError, match="typo"):
            distrobust.compress(plain.ddp, plain.optimizer, typo=1)
        distrobust.compress(plain.ddp, plain.optimizer)

    run_ranks(1, body)


def test_a_model_that_is_not_wrapped_is_refused() -> None:
    net = mlp()
    with pytest.raises(ConfigError, match="got a Sequential, wanted a model wrapped in DistributedDataParallel"):
        distrobust.compress(net, torch.optim.SGD(net.parameters(), lr=0.1))  # type: ignore[arg-type]
