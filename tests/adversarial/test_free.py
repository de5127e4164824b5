"""Free adversarial training: its perturbation, held against the authors' loop."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrobust.adversarial import free
from distrobust.adversarial.threat import Threat, project

torch.set_num_threads(1)
EPS = 8 / 255


def problem() -> tuple[nn.Module, list[Tensor], Tensor]:
    """Images away from 0 and 1, where the authors' clipping and ours are the same."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, [0.2 + 0.6 * torch.rand(6, 3, 4, 4, generator=g) for _ in range(2)], torch.arange(6) % 3


def transcribed(model: nn.Module, batches: list[Tensor], y: Tensor, replays: int, rate: float) -> Tensor:
    """The authors' loop (free_adv_train), line by line, without normalisation: the noise after two batches."""
    global_noise = torch.zeros(6, 3, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for x in batches:
        for _ in range(replays):
            noise_batch = global_noise.clone().requires_grad_()
            in1 = (x + noise_batch).clamp(0, 1)
            loss = F.cross_entropy(model(in1), y)
            optimizer.zero_grad()
            loss.backward()
            assert noise_batch.grad is not None
            global_noise += EPS * torch.sign(noise_batch.grad)
            global_noise.clamp_(-EPS, EPS)
            optimizer.step()
    return global_noise


def ours(model: nn.Module, batches: list[Tensor], y: Tensor, replays: int, rate: float, threat: Threat) -> Tensor:
    delta: Tensor | None = None
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for x in batches:
        for _ in range(replays):
            x_adv = free.start(x, delta, threat)
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            delta = free.moved(x, x_adv, threat)
            optimizer.step()
    assert delta is not None
    return delta


def test_it_is_the_authors_loop() -> None:
    model, batches, y = problem()
    theirs = transcribed(model, batches, y, replays=3, rate=0.1)
    weights = [p.detach().clone() for p in model.parameters()]
    model, batches, y = problem()
    delta = ours(model, batches, y, replays=3, rate=0.1, threat=Threat("linf", EPS))
    torch.testing.assert_close(delta, theirs, rtol=0, atol=1e-6)
    for a, b in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l2", 0.5), Threat("l1", 2.0)], ids=lambda t: t.norm)
def test_the_perturbation_stays_in_the_ball_and_in_the_unit_interval_and_raises_the_loss(threat: Threat) -> None:
    model, (x, _), y = problem()
    x = (2 * x - 0.5).clamp(0, 1)  # some at the edge
    delta = ours(model, [x, x], y, replays=3, rate=0.0, threat=threat)
    x_adv = x + delta
    torch.testing.assert_close(project(x_adv, x, threat), x_adv, rtol=0, atol=1e-5)
    assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y) + 0.01


def test_a_smaller_ball_holds_what_a_larger_one_left() -> None:
    """eps may change from step to step."""
    _, (x, _), _ = problem()
    x_adv = free.start(x, torch.full_like(x, 0.1), Threat("linf", 0.02))
    torch.testing.assert_close(x_adv.detach() - x, torch.full_like(x, 0.02), rtol=0, atol=1e-6)
