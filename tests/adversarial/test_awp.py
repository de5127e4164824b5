"""Laws of adversarial weight perturbation."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrobust.adversarial.awp import perturbed_weights
from distrobust.models import build

torch.set_num_threads(1)
GAMMA = 0.01


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    model = build("cnn", 4, (3, 8, 8), (0.5,) * 3, (0.25,) * 3, seed=0)
    return model, torch.rand(16, 3, 8, 8, generator=g), torch.randint(4, (16,), generator=g)


def test_every_matrix_moves_by_gamma_of_its_norm_along_its_gradient_and_comes_back_to_the_bit() -> None:
    model, x, y = problem()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = dict(zip(before, torch.autograd.grad(F.cross_entropy(model(x), y), model.parameters()), strict=True))
    with perturbed_weights(model, lambda: F.cross_entropy(model(x), y), GAMMA):
        for name, p in model.named_parameters():
            w, g = before[name], gradients[name]
            moved = GAMMA * w.norm() / g.norm() * g if p.ndim > 1 else torch.zeros_like(w)
            torch.testing.assert_close(p.detach() - w, moved, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_loss_is_higher_inside() -> None:
    model, x, y = problem()
    model.eval()
    outside = F.cross_entropy(model(x), y)
    with perturbed_weights(model, lambda: F.cross_entropy(model(x), y), GAMMA):
        inside = F.cross_entropy(model(x), y)
    random = outside.new_tensor(0.0)
    for seed in range(5):  # as far, in a random direction
        g = torch.Generator().manual_seed(seed)
        drawn = {p: torch.randn(p.shape, generator=g) for p in model.parameters() if p.ndim > 1}
        with perturbed_weights(
            model, lambda drawn=drawn: torch.stack([(p * d).sum() for p, d in drawn.items()]).sum(), GAMMA
        ):
            random = torch.maximum(random, F.cross_entropy(model(x), y) - outside)
    assert inside - outside > 3 * random


def test_it_leaves_no_gradient_and_no_trace_in_the_statistics() -> None:
    model, x, y = problem()
    statistics = [b.clone() for b in model.buffers()]
    with perturbed_weights(model, lambda: F.cross_entropy(model(x), y), GAMMA):
        assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_weights_come_back_after_an_exception() -> None:
    model, x, y = problem()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), perturbed_weights(model, lambda: F.cross_entropy(model(x), y), GAMMA):
        raise ZeroDivisionError
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
def test_without_a_usable_gradient_the_weights_stay(factor: float) -> None:
    model, x, y = problem()
    before = [p.detach().clone() for p in model.parameters()]
    with perturbed_weights(model, lambda: F.cross_entropy(model(x), y) * factor, GAMMA):
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_frozen_parameter_stays() -> None:
    model, x, y = problem()
    frozen = model.get_submodule("stem.conv").weight
    assert isinstance(frozen, nn.Parameter)
    frozen.requires_grad_(False)
    before = frozen.clone()
    with perturbed_weights(model, lambda: F.cross_entropy(model(x), y), GAMMA):
        assert torch.equal(frozen, before)
