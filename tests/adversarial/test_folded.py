"""A folded model is the model in evaluation mode, in value and in gradient; what cannot be folded stays as it is."""

import logging
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrobust.adversarial.attacks import Attack, cross_entropy_sum, evaluation_mode, input_gradient
from distrobust.adversarial.conv_relu import ConvReLU, is_available
from distrobust.adversarial.folded import Folded
from distrobust.adversarial.threat import Threat
from distrobust.models import MODELS, build

torch.set_num_threads(1)


def images(num: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(num, 3, 16, 16, generator=g), torch.randint(4, (num,), generator=g)


def train(model: nn.Module, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        x, y = images()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()


class Shared(nn.Module):
    """One convolution before two norms, and one with a bias and groups; a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.grouped, self.third = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=True), nn.BatchNorm2d(4, eps=0.1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv(x)) + self.second(self.conv(x))
        x = x + self.third(self.grouped(x)).relu()
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def reference(name: str) -> Callable[[], nn.Module]:
    return lambda: build(name, 4, (3, 16, 16), (0.5,) * 3, (0.25,) * 3, seed=0)


@pytest.mark.parametrize("make", [*(reference(name) for name in MODELS), Shared])
@pytest.mark.parametrize("last", [False, True])
def test_values_and_input_gradients_are_the_models_also_after_its_weights_change(
    make: Callable[[], nn.Module], last: bool
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    x, y = images()
    if last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    train(model)
    folded = Folded(model, x)
    for _ in range(2):
        twin = folded.current()
        assert not any(isinstance(m, nn.BatchNorm2d) for m in twin.modules()) or make is Shared
        with evaluation_mode(model), evaluation_mode(twin):
            expected, logits = input_gradient(model, x, y, cross_entropy_sum)
            ours, others = input_gradient(twin, x, y, cross_entropy_sum)
        torch.testing.assert_close(others, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
        train(model)


@pytest.mark.skipif(not is_available(), reason="this build of torch has no oneDNN")
def test_on_a_cpu_a_relu_right_after_a_convolution_is_part_of_it() -> None:
    model, (x, _) = reference("resnet9")(), images()
    train(model)
    kinds = [type(m) for m in Folded(model, x).current().modules()]
    assert kinds.count(ConvReLU) == 5  # those before a maximum are not
    assert kinds.count(nn.ReLU) == 3


def test_a_convolution_used_twice_is_not_folded() -> None:
    model, (x, _) = Shared(), images()
    folded = Folded(model, x)
    kinds = [type(m) for m in folded.current().modules()]
    assert kinds.count(nn.BatchNorm2d) == 2


def test_the_model_itself_is_left_alone() -> None:
    model, (x, y) = reference("cnn")(), images()
    train(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    twin = Folded(model, x).current()
    Attack("pgd", steps=2)(twin, x, y, Threat("linf", 0.1), torch.Generator().manual_seed(0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = reference("cnn")()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.net(x if x.mean() > 0 else -x))


class Random(Branching):
    """Traced, the noise would be one constant."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x + random.random())
        return logits


def hooked() -> nn.Module:
    model = reference("cnn")()
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Branching, "cannot be traced"),
        (Random, "computes something else"),
        (hooked, "forward hooks"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), "no batch norm follows a convolution"),
    ],
)
def test_what_cannot_be_folded_is_attacked_as_it_is(
    make: Callable[[], nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    train(model) if not isinstance(model, Branching) else train(model.net)
    with caplog.at_level(logging.INFO):
        assert Folded(model, images()[0]).current() is model
    assert reason in caplog.text


class Remembering(Branching):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        logits: Tensor = self.net(x)
        return logits


def test_tracing_leaves_nothing_behind_in_the_model() -> None:
    model, (x, _) = Remembering(), images()
    train(model.net)
    assert Folded(model, x).current() is not model
    assert isinstance(model.last, Tensor)
