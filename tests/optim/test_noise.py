"""The temporal estimator of gradient noise."""

import math

import pytest
import torch

from distrobust.optim.noise import TemporalNoise


def gradient(step: int, n: int = 40) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(step))


def test_noise_follows_the_equation() -> None:
    """H_t = b2 H_{t-1} + (1 - b2) |G_t - G_{t-1}|^2, beginning at the first difference. float32 norms: 2^-20."""
    noise = TemporalNoise(beta2=0.8)
    expected = None
    for step in range(5):
        noise.update({"w": float(noise.observe("w", gradient(step)))}, 1)
        noise.commit()
        if step:
            squared = float((gradient(step).double() - gradient(step - 1).double()).square().sum())
            expected = squared if expected is None else 0.8 * expected + 0.2 * squared
            assert noise.noise["w"] == pytest.approx(expected, rel=2.0**-20)


def test_the_first_gradient_says_nothing() -> None:
    noise = TemporalNoise(0.9)
    first = noise.observe("w", gradient(0))
    assert math.isnan(first)
    noise.update({"w": float(first)}, 1)
    assert noise.noise == {}


def test_local_differences_are_divided_by_the_number_of_workers() -> None:
    noise = TemporalNoise(0.9)
    noise.update({"w": 12.0}, 4)
    assert noise.noise == {"w": 3.0}


def test_noise_of_the_mean_is_estimated_without_bias_from_local_gradients() -> None:
    """Variance 1 a coordinate on each of 4 workers: the mean's successive differences have 2 / 4 a coordinate.

    20,000 coordinates: relative standard deviation of a sum of squares sqrt(2 / 20,000) = 1 %, five of them.
    """
    n, num_workers = 20_000, 4
    observed = []
    for worker in range(num_workers):
        noise = TemporalNoise(0.9)
        noise.observe("w", gradient(10 + worker, n))
        noise.commit()
        observed.append(float(noise.observe("w", gradient(20 + worker, n))))
    noise.update({"w": sum(observed) / num_workers}, num_workers)
    assert noise.noise["w"] == pytest.approx(n * 2 / num_workers, rel=0.05)


def test_a_step_that_did_not_happen_leaves_no_trace() -> None:
    noise, twin = TemporalNoise(0.9), TemporalNoise(0.9)
    for one in (noise, twin):
        one.observe("w", gradient(0))
        one.commit()
    noise.observe("w", torch.full((40,), math.nan))  # not committed
    assert torch.equal(noise.observe("w", gradient(1)), twin.observe("w", gradient(1)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_difference_says_nothing(value: float) -> None:
    noise = TemporalNoise(0.9)
    noise.update({"w": 2.0}, 1)
    noise.update({"w": value}, 1)
    assert noise.noise == {"w": 2.0}


def test_the_gradient_is_copied() -> None:
    """DDP overwrites the bucket that the gradient is a view of."""
    noise = TemporalNoise(0.9)
    g = gradient(0)
    noise.observe("w", g)
    g.zero_()
    noise.commit()
    expected = (gradient(1) - gradient(0)).square().sum()
    torch.testing.assert_close(noise.observe("w", gradient(1)), expected, rtol=2.0**-20, atol=0)


def test_a_constant_gradient_has_no_noise() -> None:
    noise = TemporalNoise(0.9)
    for _ in range(3):
        noise.update({"w": float(noise.observe("w", gradient(0)))}, 1)
        noise.commit()
    assert noise.noise == {"w": 0.0}


def test_a_loaded_state_continues_bit_identically() -> None:
    whole, first = TemporalNoise(0.9), TemporalNoise(0.9)
    second = TemporalNoise(0.9)
    for step in range(6):
        if step == 3:
            second.load_state_dict(first.state_dict())
        for one in (whole, first if step < 3 else second):
            one.update({"w": float(one.observe("w", gradient(step)))}, 2)
            one.commit()
    assert second.noise == whole.noise
