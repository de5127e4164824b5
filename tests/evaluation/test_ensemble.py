"""Laws of mixing two models' weights and of re-estimating batch-norm statistics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.errors import ConfigError, ModelError
from distrobust.evaluation.counting import batch_seed
from distrobust.evaluation.ensemble import interpolate, reestimate_


def state(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(4, 3, generator=g),
        "half": torch.randn(5, generator=g).to(torch.float16),
        "odd": torch.tensor([-0.0, math.inf, 1e38]) * (-1) ** seed,  # no arithmetic on these gives them back
        "count": torch.tensor(10 + seed),
        "scalar": torch.randn((), generator=g),
    }


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_the_ends_are_the_two_models_to_the_bit() -> None:
    before, after = state(0), state(1)
    assert bits(interpolate(before, after, 0.0)) == bits(before)
    assert bits(interpolate(before, after, 1.0)) == bits(after)


@given(st.floats(0, 1), st.integers(0, 20))
def test_in_between_it_is_the_weighted_mean_and_lies_between(a: float, seed: int) -> None:
    before, after = state(seed), state(seed + 1)
    del before["odd"], after["odd"]
    mixed = interpolate(before, after, a)
    for name in ("weight", "scalar"):
        expected = (1 - a) * before[name].double() + a * after[name].double()
        # three roundings of float32 numbers below 8
        torch.testing.assert_close(mixed[name].double(), expected, rtol=0, atol=8 * 3 * 2**-24)
        low, high = torch.minimum(before[name], after[name]), torch.maximum(before[name], after[name])
        assert ((mixed[name] >= low) & (mixed[name] <= high)).all()
    assert {name: value.dtype for name, value in mixed.items()} == {name: v.dtype for name, v in before.items()}


@given(st.floats(0, 1))
def test_a_model_mixed_with_itself_is_itself(a: float) -> None:
    one = {name: value for name, value in state(3).items() if name != "odd"}
    assert bits(interpolate(one, one, a)) == bits(one)


@pytest.mark.parametrize(("a", "count"), [(0.0, 10), (0.49, 10), (0.5, 11), (1.0, 11)])
def test_whole_numbers_come_from_the_nearer_model(a: float, count: int) -> None:
    assert int(interpolate(state(0), state(1), a)["count"]) == count


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_the_mixture_shares_no_memory_with_the_models(a: float) -> None:
    before, after = state(0), state(1)
    kept = bits(before), bits(after)
    for tensor in interpolate(before, after, a).values():
        tensor.zero_()
    assert (bits(before), bits(after)) == kept


@pytest.mark.parametrize("a", [-0.1, 1.1, math.nan])
def test_a_share_outside_is_refused(a: float) -> None:
    with pytest.raises(ConfigError, match="wanted a share of the fine-tuned model from 0 to 1"):
        interpolate(state(0), state(1), a)


def test_weights_of_two_models_are_named_in_one_line() -> None:
    other = state(1)
    other["extra"] = other.pop("half")
    other["weight"] = torch.zeros(4, 2)
    other["scalar"] = other["scalar"].double()
    with pytest.raises(ModelError) as caught:
        interpolate(state(0), other, 0.5)
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "1 missing after fine-tuning (half)",
        "1 unexpected after fine-tuning (extra)",
        "2 different after fine-tuning (weight is (4, 3) float32 and (4, 2) float32)",
    ):
        assert part in text


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(x).relu()).mean((2, 3)))  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_mean = torch.tensor([0.8, 0.2])
    return model


def batches(num: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (6, 2, 4, 4), generator=g, dtype=torch.uint8) for _ in range(num)]
    return [(one, torch.arange(6) % 3) for one in images]


def test_statistics_are_the_plain_mean_over_the_batches_and_nothing_else_changes() -> None:
    model, given_ = net(), batches(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert reestimate_(model, given_, None, None, 0) == 1
    means = torch.stack([x.float().div(255).mean((0, 2, 3)) for x, _ in given_])
    variances = torch.stack([x.float().div(255).transpose(0, 1).flatten(1).var(1) for x, _ in given_])
    torch.testing.assert_close(model.norm.running_mean, means.mean(0))
    torch.testing.assert_close(model.norm.running_var, variances.mean(0))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert model.norm.momentum == 0.3
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_statistics_on_adversarial_images_are_those_of_images_that_fool_the_model_as_it_came() -> None:
    attack, threat = Attack("pgd", steps=3), Threat("linf", 0.1)
    victim, model = net(), net()
    reestimate_(model, batches(2), attack, threat, 0)
    seen: list[Tensor] = []
    watched = net()
    watched.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]) if module.training else None)
    reestimate_(watched, batches(2), attack, threat, 0)
    assert len(seen) == 2
    for index, (x_adv, (images, labels)) in enumerate(zip(seen, batches(2), strict=True)):
        generator = torch.Generator().manual_seed(batch_seed(0, index))
        assert torch.equal(x_adv, attack(victim, images.float() / 255, labels, threat, generator))
    torch.testing.assert_close(model.norm.running_mean, torch.cat(seen).mean((0, 2, 3)))


def test_a_model_without_batch_norm_has_nothing_to_estimate() -> None:
    assert reestimate_(nn.Linear(2, 2), batches(1), None, None, 0) == 0


def test_flags_and_momentum_come_back_after_an_error() -> None:
    model = net().train()
    with pytest.raises(RuntimeError):
        reestimate_(model, [(torch.zeros(1, 7, 4, 4, dtype=torch.uint8), torch.zeros(1))], None, None, 0)
    assert all(module.training for module in model.modules())
    assert model.norm.momentum == 0.3
