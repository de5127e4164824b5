"""Noise-adaptive rates on top of torch's own optimizers."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from distrobust.errors import CheckpointError, ConfigError
from distrobust.optim.adaptive import NoiseAdaptive
from distrobust.optim.rates import rate_ratios


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    nn.functional.cross_entropy(net(x), y).backward()


def muon_and_adamw(net: nn.Module, **options: Any) -> list[Optimizer]:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    return [Muon(matrices, lr=0.02, **options), AdamW([p for p in net.parameters() if p.ndim < 2], lr=0.01, **options)]


INNER: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    "sgd": lambda net: [SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)],
    "adamw": lambda net: [AdamW(net.parameters(), lr=0.01, weight_decay=0.1)],
    "muon and adamw": muon_and_adamw,
}


def one_group_a_parameter(optimizers: list[Optimizer]) -> None:
    """Done by hand: what users of per-layer rates would write."""
    for optimizer in optimizers:
        groups, optimizer.param_groups = optimizer.param_groups, []
        for group in groups:
            for parameter in group["params"]:
                optimizer.add_param_group({**group, "params": [parameter]})


@pytest.mark.parametrize("kind", INNER)
def test_steps_are_those_of_the_inner_optimizer_with_each_layers_own_rate(kind: str) -> None:
    net, twin = model(), model()
    adaptive = NoiseAdaptive(INNER[kind](net), net, alpha=1e-3)
    by_hand = INNER[kind](twin)
    one_group_a_parameter(by_hand)
    base = {id(p): group["lr"] for o in by_hand for group in o.param_groups for p in group["params"]}
    names = {id(p): name for name, p in twin.named_parameters()}
    for step in range(6):
        for one in (net, twin):
            one.zero_grad()
            backward(one, step)
        adaptive.step()
        for optimizer in by_hand:
            for group in optimizer.param_groups:
                which = id(group["params"][0])
                group["lr"] = base[which] * adaptive.ratios[names[which]]
            optimizer.step()
    assert min(adaptive.ratios.values()) < 0.9
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_ratios_are_those_of_the_temporal_noise() -> None:
    net = model()
    adaptive = NoiseAdaptive(SGD(net.parameters(), lr=0.1), net, alpha=0.01, beta2=0.5)
    gradients: list[dict[str, Tensor]] = []
    for step in range(3):
        net.zero_grad()
        backward(net, step)
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        adaptive.step()
    squares = [torch.stack([(b[name] - a[name]).double().square().sum() for name in a]) for a, b in pairwise(gradients)]
    groups = torch.tensor([0 if p.ndim > 1 else 1 for p in net.parameters()])
    expected = rate_ratios(0.5 * squares[0] + 0.5 * squares[1], groups, 0.01).tolist()
    assert list(adaptive.ratios.values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, 10),  # computes the next rate from the present one
        lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
        lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=False),
    ],
)
def test_schedulers_see_and_set_the_base_rate(make: Callable[[Optimizer], Any]) -> None:
    nets = model(), model()
    plain = SGD(nets[0].parameters(), lr=0.1)
    adaptive = NoiseAdaptive(SGD(nets[1].parameters(), lr=0.1), nets[1], alpha=1e-3)
    schedulers = make(plain), make(adaptive)
    for step in range(8):
        for net, optimizer, scheduler in zip(nets, (plain, adaptive), schedulers, strict=True):
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()
            scheduler.step()
        assert adaptive.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert min(adaptive.ratios.values()) < 0.9


def test_a_loaded_state_continues_bit_identically() -> None:
    def run(net: nn.Module, adaptive: NoiseAdaptive, steps: range) -> None:
        for step in steps:
            adaptive.zero_grad()
            backward(net, step)
            adaptive.step()

    whole, first, second = model(), model(), model(7)
    one, two, three = (NoiseAdaptive(AdamW(net.parameters()), net, alpha=1e-3) for net in (whole, first, second))
    run(whole, one, range(6))
    run(first, two, range(3))
    second.load_state_dict(first.state_dict())
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    run(second, three, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_it_works_under_a_grad_scaler() -> None:
    net = model()
    adaptive = NoiseAdaptive(SGD(net.parameters(), lr=0.1), net)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(2):
        adaptive.zero_grad()
        generator = torch.Generator().manual_seed(step)
        scaler.scale(net(torch.randn(4, 6, generator=generator)).square().mean()).backward()
        scaler.step(adaptive)
        scaler.update()
    assert set(adaptive.noise.by_name()) == set(adaptive.ratios)


def test_groups_can_be_changed() -> None:
    net = model()
    adaptive = NoiseAdaptive(SGD(net.parameters(), lr=0.1), net, alpha=1e-6, groups={"4.weight": "head"})
    for step in range(3):
        adaptive.zero_grad()
        backward(net, step)
        adaptive.step()
    assert adaptive.ratios["4.weight"] == 1.0  # alone in its group
    with pytest.raises(ConfigError, match=r"groups: 'head\.weight' is no parameter of the model"):
        NoiseAdaptive(SGD(net.parameters(), lr=0.1), net, groups={"head.weight": "head"})


def test_a_scheduler_inside_the_inner_step_is_refused() -> None:
    class Impatient(SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                group["lr"] = 0.5 * group["lr"]

    net = model()
    adaptive = NoiseAdaptive(Impatient(net.parameters(), lr=0.1), net)
    backward(net, 0)
    with pytest.raises(ConfigError, match=r"Impatient\.step\(\) changed its learning rate while it ran"):
        adaptive.step()


@pytest.mark.parametrize("options", [{"k": 0}, {}], ids=["known from the start", "made in the step"])
def test_an_optimizer_that_counts_in_its_groups_is_refused(options: dict[str, int]) -> None:
    class Counting(SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1

    net = model()
    adaptive = NoiseAdaptive(Counting([{"params": list(net.parameters()), **options}], lr=0.1), net)
    backward(net, 0)
    with pytest.raises(ConfigError, match=r"Counting\.step\(\) changed its 'k' while it ran"):
        adaptive.step()


def test_an_optimizer_with_one_rate_for_all_is_refused() -> None:
    net = model()
    with pytest.raises(ConfigError, match="got LBFGS, which moves all layers by one rate"):
        NoiseAdaptive(torch.optim.LBFGS(net.parameters()), net)


def test_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"SGD holds a parameter of shape \(8, 6\) that the model does not"):
        NoiseAdaptive(SGD(model().parameters(), lr=0.1), model())


def test_a_model_with_a_scalar_is_refused() -> None:
    net = model()
    net.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match=r"parameter 'scale' of shape .* has no dimension"):
        NoiseAdaptive(SGD(net.parameters(), lr=0.1), net)


def test_a_loaded_optimizer_has_its_ratios_before_the_first_step() -> None:
    """Step-ahead asks for them then."""
    net = model()
    adaptive, loaded = (NoiseAdaptive(SGD(net.parameters(), lr=0.1), net, alpha=1e-3) for _ in range(2))
    for step in range(3):
        adaptive.zero_grad()
        backward(net, step)
        adaptive.step()
    loaded.load_state_dict(adaptive.state_dict())
    assert loaded.ratios == adaptive.ratios
    assert min(loaded.ratios.values()) < 1.0


def test_hooks_and_copies_work_as_with_any_optimizer() -> None:
    net = model()
    adaptive = NoiseAdaptive(SGD(net.parameters(), lr=0.1), net)
    seen = []
    adaptive.register_step_pre_hook(lambda *_: seen.append("before"))
    adaptive.register_step_post_hook(lambda *_: seen.append("after"))
    backward(net, 0)
    adaptive.step()
    assert seen == ["before", "after"]
    copy.deepcopy(adaptive).step()
    adaptive.step()


def test_frozen_parameters_keep_the_base_rate() -> None:
    net = model()
    net[0].requires_grad_(False)
    adaptive = NoiseAdaptive(SGD(net.parameters(), lr=0.1), net)
    backward(net, 0)
    adaptive.step()
    assert "0.weight" not in adaptive.ratios


def test_a_state_of_another_optimizer_and_sparse_gradients_are_refused() -> None:
    net = model()
    adaptive = NoiseAdaptive(SGD(net.parameters(), lr=0.1), net)
    with pytest.raises(CheckpointError, match="not the state of a NoiseAdaptive optimizer"):
        adaptive.load_state_dict(adaptive.optimizers[0].state_dict())
    sparse = nn.Embedding(5, 3, sparse=True)
    adaptive = NoiseAdaptive(SGD(sparse.parameters(), lr=0.1), sparse)
    sparse(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match=r"NoiseAdaptive: the gradient of 'weight' is torch\.sparse_coo"):
        adaptive.step()
