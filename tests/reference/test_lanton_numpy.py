"""LANTON's algorithm 1 in numpy with singular value decompositions, written from the equations of the paper."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from distrobust.optim.lanton import Lanton

Array = npt.NDArray[np.float64]
LR, B1, B2, ALPHA, DECAY, STEPS = 0.05, 0.9, 0.8, 2.0, 0.1, 12


def dual(norm: str, g: Array) -> float:
    if norm == "spectral":
        m = g.reshape(len(g), -1)
        return float(np.sqrt(m.shape[0] / m.shape[1]) * np.linalg.svd(m, compute_uv=False).sum())
    return float(np.abs(g).sum()) if norm == "sign" else float(np.sqrt(g.size) * np.linalg.norm(g))


def oracle(norm: str, b: Array) -> Array:
    if norm == "spectral":
        m = b.reshape(len(b), -1)
        u, _, v = np.linalg.svd(m, full_matrices=False)
        return np.asarray(np.sqrt(m.shape[0] / m.shape[1]) * (u @ v)).reshape(b.shape)
    return np.sign(b) if norm == "sign" else b / np.sqrt((b**2).mean())


def reference(start: list[Array], gradients: list[list[Array]], norm: str) -> tuple[list[Array], list[float]]:
    x = [one.copy() for one in start]
    b = [np.zeros_like(one) for one in start]
    h = [np.nan] * len(x)
    ratios: list[float] = []
    for step, g in enumerate(gradients):
        for i in range(len(x)):
            b[i] = B1 * b[i] + (1 - B1) * g[i]
            if step:
                square = dual(norm, g[i] - gradients[step - 1][i]) ** 2
                h[i] = square if np.isnan(h[i]) else B2 * h[i] + (1 - B2) * square
        a = [1.0 if np.isnan(one) else ALPHA / np.sqrt(ALPHA**2 + one) for one in h]
        ratios = [float(np.sqrt(one / max(a))) for one in a]
        for i, ratio in enumerate(ratios):
            x[i] = (1 - LR * ratio * DECAY) * x[i] - LR * ratio * oracle(norm, b[i])
    return x, ratios


# float32 against float64 over 12 steps; spectral: directions by five Newton-Schulz steps, each within 0.16 of U V^T's
# singular values, which moves an entry by at most 0.16 LR a step
CASES = {
    "sign": ([(7, 5), (4, 5)], 1e-5),
    "rms": ([(9,), (6,)], 1e-5),
    "spectral": ([(6, 10), (10, 6), (4, 3, 3, 3)], 0.16 * LR * STEPS),
}


@pytest.mark.parametrize("norm", CASES)
def test_trajectories_follow_the_paper(norm: str) -> None:
    shapes, tolerance = CASES[norm]
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(shape) for shape in shapes]
    # layers with noise of different size around a fixed mean, so that ratios differ
    means = [rng.standard_normal(shape) for shape in shapes]
    gradients = [
        [mean + 3.0**i * rng.standard_normal(mean.shape) for i, mean in enumerate(means)] for _ in range(STEPS)
    ]
    expected, expected_ratios = reference(start, gradients, norm)
    parameters = [nn.Parameter(torch.tensor(one, dtype=torch.float32)) for one in start]
    groups: list[dict[str, Any]] = [{"params": parameters, "norm": norm, "adjust_lr_fn": None}]
    optimizer = Lanton(groups, LR, momentum=B1, beta2=B2, alpha=ALPHA, weight_decay=DECAY, noise_every=1)
    for g in gradients:
        for parameter, one in zip(parameters, g, strict=True):
            parameter.grad = torch.tensor(one, dtype=torch.float32)
        optimizer.step()
    assert min(expected_ratios) < 0.8  # the noise mattered
    assert [float(r) for r in optimizer.ratios.values()] == pytest.approx(expected_ratios, rel=1e-4)
    for parameter, one in zip(parameters, expected, strict=True):
        assert np.abs(parameter.detach().numpy() - one).max() <= tolerance
