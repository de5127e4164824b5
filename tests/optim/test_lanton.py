"""The optimizer LANTON; its equations are held by tests/reference/test_lanton_numpy.py."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrobust.errors import ConfigError
from distrobust.optim.lanton import Lanton
from distrobust.optim.noise import SpreadNoise, TemporalNoise
from distrobust.optim.norms import dual_norms


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))
    return net.to(dtype)


def backward(net: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 2, 4, 4, generator=generator).to(next(net.parameters()).dtype)
    y = torch.randint(0, 3, (8,), generator=generator)
    (scale * nn.functional.cross_entropy(net(x).float(), y)).backward()


def train(net: nn.Module, optimizer: Lanton, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()


def parameters(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def test_the_quietest_of_each_group_moves_at_the_full_rate() -> None:
    net = model()
    optimizer = Lanton(net, 0.01, alpha=1e-6)
    train(net, optimizer, range(8))
    for group in optimizer.param_groups:
        ratios = [float(optimizer.ratios[name]) for name in group["param_names"]]
        assert max(ratios) == 1.0
        assert all(0.0 < ratio <= 1.0 for ratio in ratios)
    assert min(float(r) for r in optimizer.ratios.values()) < 0.9


def test_measuring_every_few_steps_averages_over_as_many_steps() -> None:
    """Steps 4 and 8 of 8 are compared with those before: H = b2^4 H + (1 - b2^4) ||G - G_before||_*^2."""
    net = model()
    optimizer = Lanton(net, 0.0, beta2=0.9, noise_every=4)
    gradients = []
    for step in range(8):
        optimizer.zero_grad()
        backward(net, step)
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
        optimizer.step()
    assert optimizer.noise is not None
    for name, h in optimizer.noise.by_name().items():
        norm = optimizer.noise.norms[name]
        first, second = (float(dual_norms(norm, [gradients[i][name] - gradients[i - 1][name]])[0]) ** 2 for i in (3, 7))
        assert h == pytest.approx(0.9**4 * first + (1 - 0.9**4) * second, rel=1e-4)


def test_entries_of_every_norm_move_by_a_fifth_of_the_rate() -> None:
    """In root mean square, whatever the shape; five Newton-Schulz steps leave singular values within 0.16 of 1."""
    shapes = {
        "spectral": [(6, 20), (20, 6), (4, 3, 3, 3), (8, 8)],
        "sign": [(7, 5)],
        "rms": [(9,)],
        "frobenius": [(4, 5)],
    }
    tensors = {norm: [nn.Parameter(torch.zeros(shape)) for shape in some] for norm, some in shapes.items()}
    optimizer = Lanton([{"params": some, "norm": norm} for norm, some in tensors.items()], 0.1)
    for some in tensors.values():
        for parameter in some:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    for norm, some in tensors.items():
        for parameter in some:
            moved = float(parameter.detach().square().mean().sqrt())
            assert moved == pytest.approx(0.2 * 0.1, rel=0.16 if norm == "spectral" else 1e-5), (norm, parameter.shape)


def test_a_state_of_before_there_was_a_scale_keeps_the_rate_of_the_norm() -> None:
    net = model()
    old = Lanton(net, 0.1, adjust_lr_fn=None).state_dict()
    for group in old["param_groups"]:
        del group["adjust_lr_fn"]
    optimizer, before = Lanton(net), net[4].bias.detach().clone()
    optimizer.load_state_dict(old)
    backward(net, 0)
    optimizer.step()
    moved = float((net[4].bias.detach() - before).square().mean().sqrt())
    assert moved == pytest.approx(0.1, rel=1e-5)


def test_without_noise_all_layers_move_at_the_full_rate() -> None:
    net = model()
    optimizer = Lanton(net, 0.01, noise="none", alpha=1e-6)
    train(net, optimizer, range(4))
    assert all(float(ratio) == 1.0 for ratio in optimizer.ratios.values())


def test_updates_do_not_depend_on_the_scale_of_the_loss_far_below_the_noise() -> None:
    """2^10 is exact; the directions are of norm one and ratios of order zero for alpha -> 0."""
    nets = model(), model()
    for net, scale in zip(nets, (1.0, 1024.0), strict=True):
        optimizer = Lanton(net, 0.01, alpha=1e-9)
        for step in range(6):
            optimizer.zero_grad()
            backward(net, step, scale)
            optimizer.step()
    for ours, theirs in zip(*map(parameters, nets), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_loaded_state_continues_bit_identically() -> None:
    whole, first = model(), model()
    one, two = Lanton(whole, alpha=1e-6), Lanton(first, alpha=1e-6)
    train(whole, one, range(10))
    train(first, two, range(7))
    second = model(seed=5)
    second.load_state_dict(first.state_dict())
    three = Lanton(second, alpha=1e-6)
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    train(second, three, range(7, 10))
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(second), strict=True))


def test_parameters_of_low_precision_keep_their_state_in_float32_through_a_checkpoint() -> None:
    net = model(dtype=torch.bfloat16)
    optimizer = Lanton(net)
    train(net, optimizer, range(2))
    loaded = Lanton(net)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in net.parameters():
        assert parameter.dtype == torch.bfloat16
        ours, theirs = (o.state[parameter]["momentum_buffer"] for o in (loaded, optimizer))
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@torch._dynamo.config.patch(optimize_ddp=False)  # which looks at what tests of DDP left behind in the process
def test_a_compiled_step_is_the_same_step() -> None:
    """Traced without a break; products may be rounded in another order."""
    nets = model(), model()
    plain, compiled = (Lanton(net, alpha=1e-6) for net in nets)
    step = torch.compile(compiled.step, backend="aot_eager", fullgraph=True)
    for number in range(9):  # every kind of step twice
        for net in nets:
            net.zero_grad()
            backward(net, number)
        plain.step()
        step()
    for ours, theirs in zip(*map(parameters, nets), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_schedulers_of_torch_set_its_rate() -> None:
    optimizer = Lanton(model(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}


def test_a_parameter_without_a_gradient_stays() -> None:
    net = model()
    net[2].requires_grad_(True)
    optimizer = Lanton(net)
    before = parameters(net)
    backward(net, 0)
    net[2].weight.grad = None
    optimizer.step()
    assert torch.equal(net[2].weight, before[2])
    assert not torch.equal(net[0].weight, before[0])


def test_an_independent_gradient_is_taken_away_and_compared() -> None:
    net = model()
    optimizer = Lanton(net, noise="independent", alpha=1e-6)
    for step in range(2):
        backward(net, 100 + step)
        optimizer.keep_independent()
        assert all(p.grad is None for p in net.parameters())
        backward(net, step)
        optimizer.step()
    assert optimizer.noise is not None
    assert set(optimizer.noise.by_name()) == set(dict(net.named_parameters()))
    with pytest.raises(ConfigError, match="wanted noise='independent'"):
        Lanton(net).keep_independent()


def test_a_closure_is_called_once_with_gradients_on() -> None:
    net, calls = model(), []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        backward(net, 0)
        return 3.0

    assert Lanton(net).step(closure) == 3.0
    assert calls == [True]


def test_in_an_exchange_it_measures_the_spread_if_the_mean_is_known_and_nothing_by_itself() -> None:
    net = model()
    optimizer = Lanton(net)
    assert isinstance(optimizer.observer_for(2, True, dict(net.named_parameters())), SpreadNoise)
    train(net, optimizer, range(3))
    assert optimizer.noise is not None
    assert optimizer.noise.by_name() == {}
    assert type(Lanton(net).observer_for(2, False, dict(net.named_parameters()))) is TemporalNoise
    assert type(Lanton(net).observer_for(1, True, dict(net.named_parameters()))) is TemporalNoise
    with pytest.raises(ConfigError, match="nobody knows the mean of the second gradient"):
        Lanton(net, noise="independent").observer_for(2, False, {})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "Lanton lr: got -1.0, wanted a number from 0"),
        ({"momentum": 1.0}, "Lanton momentum: got 1.0, wanted a number from 0 to below 1"),
        ({"weight_decay": math.nan}, "Lanton weight_decay: got nan"),
        ({"alpha": 0.0}, "Lanton alpha: got 0.0, wanted a finite number above 0"),
        ({"beta2": 1.0}, "noise.beta2: got 1.0"),
        ({"noise_every": 0}, "noise_every: got 0, wanted a number of steps, 1 or more"),
        ({"adjust_lr_fn": "original"}, "Lanton adjust_lr_fn: got 'original', wanted 'match_rms_adamw' or None"),
        ({"noise": "temporal"}, "Lanton noise: got 'temporal', wanted one of previous, independent, none"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Lanton(model(), **options)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "Lanton, group 1, lr: got -1.0, wanted a number from 0"),
        ({"momentum": 1.0}, "Lanton, group 1, momentum: got 1.0, wanted a number from 0 to below 1"),
        ({"weight_decay": math.nan}, "Lanton, group 1, weight_decay: got nan"),
        ({"alpha": 0.0}, "Lanton, group 1, alpha: got 0.0, wanted a finite number above 0"),
        (
            {"adjust_lr_fn": "original"},
            "Lanton, group 1, adjust_lr_fn: got 'original', wanted 'match_rms_adamw' or None",
        ),
    ],
)
def test_impossible_options_of_one_group_are_refused(options: dict[str, Any], text: str) -> None:
    first, second = nn.Linear(3, 2).parameters(), nn.Linear(3, 2).parameters()
    groups = [{"params": first, "norm": "frobenius"}, {"params": second, "norm": "frobenius", **options}]
    with pytest.raises(ConfigError) as error:
        Lanton(groups)
    assert text in str(error.value)


def test_groups_without_a_norm_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"group 0: got norm None, wanted one of spectral, .*; or pass the model"):
        Lanton(model().parameters())


def test_sparse_gradients_are_refused() -> None:
    net = nn.Embedding(5, 3, sparse=True)
    optimizer = Lanton(net)
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match=r"gradient of 'weight' is torch\.sparse_coo, wanted a dense one; make the"):
        optimizer.step()


def test_two_parameters_of_one_name_are_refused() -> None:
    """Gradients and noise are known by name: one would move by the other's."""
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    groups = [{"params": list(net.named_parameters()), "norm": "frobenius"} for net in (one, other)]
    with pytest.raises(ConfigError, match="Lanton, group 1: got the name 'weight' a second time"):
        Lanton(groups)


def test_parameters_that_come_later_are_refused() -> None:
    net = model()
    optimizer = Lanton(net)
    with pytest.raises(ConfigError, match="make it anew to add others"):
        optimizer.add_param_group({"params": nn.Linear(3, 2).parameters(), "norm": "spectral"})
    backward(net, 0)
    optimizer.step()
