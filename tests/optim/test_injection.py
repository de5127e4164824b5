"""Annealed gradient noise."""

import pytest
import torch

from distrobust.optim.injection import add_noise_, sigma


def noised(step: int, eta: float, seed: int = 0, n: int = 100_000) -> list[torch.Tensor]:
    gradients = [torch.full((n,), 2.0), torch.full((3, 4), -1.0)]
    add_noise_(gradients, step, eta, torch.Generator().manual_seed(seed))
    return gradients


def test_variance_anneals_as_in_the_paper() -> None:
    """eta / (1 + t)^0.55; 100,000 draws know a standard deviation to 0.22 % and a mean to sigma / 316."""
    for step, eta in ((0, 0.01), (0, 1.0), (9, 0.3), (999, 0.3)):
        expected = (eta / (1 + step) ** 0.55) ** 0.5
        assert sigma(step, eta) == pytest.approx(expected)
        noise = noised(step, eta)[0] - 2.0
        assert float(noise.std()) == pytest.approx(expected, rel=0.012)
        assert abs(float(noise.mean())) < 5 * expected / 316


def test_equal_seeds_give_every_rank_the_same_noise_and_others_do_not() -> None:
    assert all(torch.equal(a, b) for a, b in zip(noised(3, 0.3), noised(3, 0.3), strict=True))
    assert not torch.equal(noised(3, 0.3)[0], noised(3, 0.3, seed=1)[0])


def test_tensors_do_not_share_their_noise() -> None:
    first, second = noised(0, 1.0, n=12)
    assert not torch.equal(first - 2.0, second.view(-1) + 1.0)
