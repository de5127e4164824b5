"""Attacks and TRADES on a linear model, against numpy written from the equations.

The reference part imports nothing of ours. For logits W x + b everything is explicit:

    grad_x CE = W^T (softmax(W x + b) - onehot(y))
    grad_x' KL(p || softmax(W x' + b)) = W^T (softmax(W x' + b) - p)
"""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from distrobust.adversarial.attacks import fgsm, n_fgsm, pgd
from distrobust.adversarial.losses import TRADES, TRADES_ATTACK
from distrobust.adversarial.threat import Threat, noise

Array = npt.NDArray[np.float64]

# ---- reference: numpy only ----


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def direction(g: Array, norm: str) -> Array:
    return np.asarray(np.sign(g) if norm == "linf" else g / np.sqrt((g**2).sum(1, keepdims=True)))


def to_ball(x_adv: Array, x: Array, norm: str, eps: float) -> Array:
    delta = x_adv - x
    if norm == "linf":
        delta = np.clip(delta, -eps, eps)
    else:
        length = np.sqrt((delta**2).sum(1, keepdims=True))
        delta = np.where(length > eps, delta * eps / length, delta)
    return np.clip(x + delta, 0.0, 1.0)


def ascent(
    w: Array, b: Array, x: Array, start: Array, target: Array, norm: str, eps: float, steps: int, alpha: float
) -> Array:
    """`steps` of ascent of -sum target log softmax, projected: cross-entropy for one-hot targets, else KL."""
    x_adv = start
    for _ in range(steps):
        g = (softmax(x_adv @ w.T + b) - target) @ w
        x_adv = to_ball(x_adv + alpha * direction(g, norm), x, norm, eps)
    return x_adv


def n_fgsm_reference(w: Array, b: Array, x: Array, eta: Array, target: Array, norm: str, eps: float) -> Array:
    start = np.clip(x + eta, 0.0, 1.0)
    g = (softmax(start @ w.T + b) - target) @ w
    return np.clip(start + eps * direction(g, norm), 0.0, 1.0)


def trades_reference(w: Array, b: Array, x: Array, x_adv: Array, onehot: Array, beta: float) -> float:
    p, q = softmax(x @ w.T + b), softmax(x_adv @ w.T + b)
    return float((-(onehot * np.log(p)).sum() + beta * (p * np.log(p / q)).sum()) / len(x))


# ---- comparison ----

SHAPE = (6, 2, 3, 3)
each_norm = pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.3)])


class Problem:
    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.w, self.b = rng.normal(size=(4, 18)), rng.normal(size=4)
        self.x = rng.random((6, 18))
        self.labels = rng.integers(0, 4, 6)
        self.onehot = np.eye(4)[self.labels]
        linear = nn.Linear(18, 4, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(self.w))
            linear.bias.copy_(torch.from_numpy(self.b))
        self.model = nn.Sequential(nn.Flatten(), linear)
        self.tx, self.y = torch.from_numpy(self.x).view(SHAPE), torch.from_numpy(self.labels)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def check(ours: torch.Tensor, reference: Array) -> None:
    # all in double; a handful of operations per step
    np.testing.assert_allclose(ours.flatten(1).numpy(), reference, rtol=0, atol=1e-12)


@each_norm
def test_fgsm(norm: str, eps: float) -> None:
    p, threat = Problem(), Threat(norm, eps)  # type: ignore[arg-type]
    check(fgsm(p.model, p.tx, p.y, threat), ascent(p.w, p.b, p.x, p.x, p.onehot, norm, eps, steps=1, alpha=eps))


@each_norm
def test_n_fgsm(norm: str, eps: float) -> None:
    p, threat = Problem(), Threat(norm, eps)  # type: ignore[arg-type]
    eta = noise(p.tx, threat.norm, 2 * eps, seeded()).flatten(1).numpy()
    ours = n_fgsm(p.model, p.tx, p.y, threat, generator=seeded())
    check(ours, n_fgsm_reference(p.w, p.b, p.x, eta, p.onehot, norm, eps))


@each_norm
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd(norm: str, eps: float, random_start: bool) -> None:
    p, threat = Problem(), Threat(norm, eps)  # type: ignore[arg-type]
    eta = noise(p.tx, threat.norm, eps, seeded()).flatten(1).numpy() if random_start else 0.0
    start = np.clip(p.x + eta, 0.0, 1.0)
    ours = pgd(p.model, p.tx, p.y, threat, generator=seeded(), steps=7, random_start=random_start)
    check(ours, ascent(p.w, p.b, p.x, start, p.onehot, norm, eps, steps=7, alpha=2.5 * eps / 7))


@each_norm
def test_trades(norm: str, eps: float) -> None:
    p, threat = Problem(), Threat(norm, eps)  # type: ignore[arg-type]
    eta = torch.empty(SHAPE).normal_(generator=seeded()).double().flatten(1).numpy()
    start, target = p.x + 0.001 * eta, softmax(p.x @ p.w.T + p.b)
    x_adv = ascent(p.w, p.b, p.x, start, target, norm, eps, steps=10, alpha=eps * 0.007 / 0.031)
    out = TRADES(beta=6.0)(p.model, p.model, p.tx, p.y, TRADES_ATTACK, threat, seeded())
    assert out.x_adv is not None
    # the KL's gradient starts near 0.001: cancellation costs three digits in the L2 direction
    np.testing.assert_allclose(out.x_adv.flatten(1).numpy(), x_adv, rtol=0, atol=1e-9)
    assert out.loss.item() == pytest.approx(trades_reference(p.w, p.b, p.x, x_adv, p.onehot, 6.0), rel=1e-8)
