"""Our hook under the real DDP against Deep Gradient Compression in numpy, step by step.

The reference part imports nothing of ours. It is written from the equations of Lin et al., ICLR 2018 (sections 3.1 to
3.3), in float64, with the paper's own velocity: for Nesterov u <- m (u + g), v <- v + u + g, so u is m times what torch
and we keep. Model: least squares, y = W x + b, whose gradients are explicit.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import worker
from torch import nn

Array = npt.NDArray[np.float64]
OUT, IN, BATCH, STEPS, RATE = 16, 25, 12, 20, 0.02

# ---- reference: numpy only ----


@dataclass(frozen=True)
class Setting:
    num_workers: int = 2
    density: float = 0.05
    m: float = 0.9
    nesterov: bool = False
    decay: float = 0.0
    masking: bool = True
    threshold: float | None = None


def data(step: int, rank: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(100 * step + rank)
    return rng.standard_normal((BATCH, IN)), rng.standard_normal((BATCH, OUT))


def start() -> list[Array]:
    rng = np.random.default_rng(7)
    return [0.3 * rng.standard_normal((OUT, IN)), 0.3 * rng.standard_normal(OUT)]


def gradients(w: list[Array], x: Array, y: Array) -> list[Array]:
    """Of the mean over the batch of |W x + b - y|^2 / 2."""
    error = (x @ w[0].T + w[1] - y) / len(x)
    return [error.T @ x, error.sum(0)]


def top_k(v: Array, k: int) -> Array:
    return np.argsort(-np.abs(v), kind="stable")[:k]


class Worker:
    """u and v of every tensor, as in algorithm 4 of the paper."""

    def __init__(self, w: list[Array], s: Setting) -> None:
        self.s = s
        self.u, self.v = ([np.zeros(t.size) for t in w] for _ in range(2))

    def sparse_gradient(self, i: int, g: Array, w: Array) -> Array:
        """What this worker sends of tensor i, zero elsewhere."""
        s = self.s
        if s.threshold is not None:
            g = g * min(1.0, s.threshold / (np.sqrt(s.num_workers) * np.linalg.norm(g)))
        g = g + s.decay * w
        if s.nesterov:
            self.u[i] = s.m * (self.u[i] + g)
            self.v[i] = self.v[i] + self.u[i] + g
        else:
            self.u[i] = s.m * self.u[i] + g
            self.v[i] = self.v[i] + self.u[i]
        chosen = top_k(self.v[i], max(1, round(s.density * g.size)))
        sent = np.zeros(g.size)
        sent[chosen] = self.v[i][chosen]
        self.v[i][chosen] = 0
        if s.masking:
            self.u[i][chosen] = 0
        return sent


def trajectory(s: Setting) -> list[list[Array]]:
    """Parameters after each step, and at the end the residuals v of rank 0."""
    w = start()
    workers = [Worker(w, s) for _ in range(s.num_workers)]
    history = []
    for step in range(STEPS):
        local = [gradients(w, *data(step, rank)) for rank in range(s.num_workers)]
        for i in range(len(w)):
            sent = [one.sparse_gradient(i, g[i].ravel(), w[i].ravel()) for one, g in zip(workers, local, strict=True)]
            w[i] = w[i] - RATE * np.mean(sent, axis=0).reshape(w[i].shape)
        history.append(list(w))
    return [*history, [v.copy() for v in workers[0].v]]


# ---- ours ----


class Model(nn.Linear):
    def __init__(self) -> None:
        super().__init__(IN, OUT)
        for p, value in zip(self.parameters(), start(), strict=True):
            p.data.copy_(torch.from_numpy(value))


def ours(s: Setting) -> list[list[Array]]:
    def body(rank: Rank) -> list[list[Array]]:
        sgd = {"lr": RATE, "momentum": s.m, "nesterov": s.nesterov, "weight_decay": s.decay}
        options = {"density": s.density, "masking": s.masking, "clip": s.threshold}
        one = worker(rank, Model, sgd=sgd, values="fp32", fuse_below=0, **options)
        history = []
        for step in range(STEPS):
            x, y = (torch.from_numpy(a).float() for a in data(step, rank.rank))
            one.optimizer.zero_grad()
            (0.5 * (one.ddp(x) - y).square().sum() / BATCH).backward()
            one.optimizer.step()
            history.append([p.double().numpy() for p in one.parameters().values()])
        return [*history, [r.v.double().numpy() for r in one.state.residuals.values()]]

    return run_ranks(s.num_workers, body)[0]


SETTINGS = {
    "plain momentum": Setting(),
    "one worker": Setting(num_workers=1),
    "three workers": Setting(num_workers=3),
    "Nesterov": Setting(nesterov=True),
    "no momentum": Setting(m=0.0),
    "weight decay": Setting(decay=0.05),
    "no masking": Setting(masking=False),
    "clipping": Setting(threshold=0.8),
    "everything": Setting(3, 0.02, 0.8, True, 0.05, True, 0.8),
    "everything, no masking": Setting(3, 0.02, 0.8, True, 0.05, False, 0.8),
    "a tenth": Setting(density=0.1, nesterov=True, decay=0.01),
}


@pytest.mark.ranks
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_step_equals_the_papers_equations(setting: Setting) -> None:
    """Ours is float32. v stays below 32 and sees 20 steps of some 40 roundings (25 + 12 products, u, v), each at most
    32 x 2^-24: as a random walk 32 x 2^-24 x sqrt(800) = 5.4e-5, of which we allow 1.5. Parameters take in v's error
    times the rate 0.02, and round twice a step below 1: 2e-6. The smallest coordinate ever sent moves one by 1.4e-4.
    """
    expected, got = trajectory(setting), ours(setting)
    for step in range(STEPS):
        for reference, mine in zip(expected[step], got[step], strict=True):
            np.testing.assert_allclose(mine, reference, rtol=0, atol=2e-6, err_msg=f"step {step}")
    for reference, mine in zip(expected[-1], got[-1], strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=8e-5)
    moved = np.abs(expected[STEPS - 1][0] - start()[0])
    assert moved.max() > 0.01


def test_the_reference_clips_in_the_clipping_setting() -> None:
    norms = [np.linalg.norm(g) for g in gradients(start(), *data(0, 0))]
    assert all(norm > 0.8 / np.sqrt(2) for norm in norms)
