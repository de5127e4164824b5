"""Fitted levels against the best there are: all ways to cut a sorted sample, by dynamic programming."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from distrobust.compression.values import TYPICAL, fit_levels

Array = npt.NDArray[np.float64]
SIZE = 256


def best_error(ordered: Array, num_levels: int) -> float:
    """Smallest sum of squared distances of `ordered` (m,), ascending, to the nearest of `num_levels` numbers."""
    m = len(ordered)
    first, second = np.zeros(m + 1), np.zeros(m + 1)
    first[1:], second[1:] = np.cumsum(ordered), np.cumsum(ordered**2)
    start, end = np.meshgrid(np.arange(m + 1), np.arange(m + 1), indexing="ij")
    count = np.maximum(end - start, 1)
    inside = second[end] - second[start] - (first[end] - first[start]) ** 2 / count
    inside[end <= start] = np.inf
    best = inside[0]
    for _ in range(num_levels - 1):
        best = (best[:, None] + inside).min(axis=0)
    return float(best[m])


def error(ordered: Array, levels: Array) -> float:
    return float((np.abs(ordered[:, None] - levels[None, :]).min(axis=1) ** 2).sum())


SAMPLES = {
    "exponential above a threshold": lambda rng: 1 + rng.exponential(1, SIZE),
    "normal, largest tenth": lambda rng: np.sort(np.abs(rng.standard_normal(10 * SIZE)))[-SIZE:],
    "lognormal, largest tenth": lambda rng: np.sort(np.exp(rng.standard_normal(10 * SIZE)))[-SIZE:],
    "uniform": lambda rng: rng.uniform(1, 2, SIZE),
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("num_levels", [2, 8])
def test_fitted_levels_are_nearly_the_best(kind: str, num_levels: int) -> None:
    """Lloyd's rounds end where each level is the mean of what is nearest to it, which need not be the best: in norm,
    within an eighth of it over 20 samples. Where the rounds begin it is up to a third.
    """
    rng = np.random.default_rng(0)
    samples = np.stack([np.sort(SAMPLES[kind](rng)) for _ in range(20)])
    samples /= samples.mean(axis=1, keepdims=True)
    fitted = fit_levels(torch.from_numpy(samples).float(), num_levels).double().numpy()
    assert (np.diff(fitted, axis=1) >= 0).all()
    ratios = [error(one, own) / best_error(one, num_levels) for one, own in zip(samples, fitted, strict=True)]
    assert min(ratios) >= 1 - 1e-4  # the reference is the best
    assert np.sqrt(np.mean(ratios)) <= 1.125


def test_the_typical_levels_are_those_of_the_distribution_they_are_said_to_be_of() -> None:
    """Threshold at half the mean and an exponential tail: 600 quantiles; each level within 2 % of the best's error."""
    quantiles = 0.5 * (1 - np.log1p(-(np.arange(600) + 0.5) / 600))
    for num_levels in (2, 8):
        typical = error(quantiles, np.array(TYPICAL[num_levels]))
        assert typical <= 1.02 * best_error(quantiles, num_levels)
