"""Laws of the Attack dataclass and of the building blocks around it."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrobust.adversarial.attacks import (
    Attack,
    cross_entropy_sum,
    default_step_size,
    evaluation_mode,
    input_gradient,
    pgd,
)
from distrobust.adversarial.threat import Threat
from distrobust.errors import ConfigError, ModelError

LINF = Threat("linf", 8 / 255)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"name": "ngfsm"}, "did you mean 'n_fgsm'"),
        ({"name": "autoattack"}, "valid: none, fgsm, n_fgsm, pgd"),
        ({"steps": 0}, "attack.steps: 0"),
        ({"step_size": 0.0}, "attack.step_size: 0.0"),
        ({"step_size": math.nan}, "attack.step_size: nan"),
    ],
)
def test_impossible_attacks_are_refused(kwargs: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Attack(**kwargs)  # type: ignore[arg-type]


def test_descriptions_name_attack_steps_norm_and_budget() -> None:
    assert Attack("pgd", steps=20).describe(LINF) == "PGD-20 Linf 8/255"
    assert Attack("n_fgsm").describe(LINF) == "N-FGSM Linf 8/255"
    assert Attack("fgsm").describe(Threat("l2", 0.5)) == "FGSM L2 0.5"
    assert Attack("none").describe(LINF) == "clean"


def test_default_step_is_the_papers() -> None:
    assert default_step_size(8 / 255, 10) == pytest.approx(2 / 255)
    assert default_step_size(0.1, 1) == pytest.approx(0.125)  # RS-FGSM: 1.25 eps


def test_the_loss_is_a_float32_sum_over_the_batch() -> None:
    logits, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(cross_entropy_sum(logits, y), 5 * F.cross_entropy(logits, y))
    assert cross_entropy_sum(logits.bfloat16(), y).dtype == torch.float32


def test_input_gradient_returns_the_gradient_and_the_logits() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
    gradient, logits = input_gradient(model, x, y, cross_entropy_sum)
    p = logits.softmax(1) - F.one_hot(y, 3)
    torch.testing.assert_close(gradient.flatten(1), p @ model.get_parameter("1.weight"))
    torch.testing.assert_close(logits, model(x).detach())
    assert not logits.requires_grad


def test_evaluation_mode_restores_a_mix_of_flags() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1)))
    model.get_submodule("1.1").eval()
    flags = [m.training for m in model.modules()]
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == flags


def test_a_given_start_replaces_the_random_one() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 2])
    start = x + 0.01
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    pgd(model, x, y, LINF, steps=1, start=start)
    handle.remove()
    assert torch.equal(seen[0], start)


class Rounding(nn.Module):
    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut, self.head = cut, nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.detach().flatten(1))
        return logits.detach() if self.cut else logits


@pytest.mark.parametrize("cut", [False, True])
def test_a_model_without_a_gradient_to_its_input_is_a_clear_line(cut: bool) -> None:
    x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    with pytest.raises(ModelError, match="Rounding: its output has no gradient with respect to its input"):
        Attack("pgd", steps=2)(Rounding(cut), x, y, LINF)
