"""Estimators of gradient noise."""

import math

import pytest
import torch
from torch import Tensor, nn

from distrobust.errors import ConfigError
from distrobust.optim.noise import IndependentNoise, Noise, SpreadNoise, TemporalNoise
from distrobust.optim.norms import NORMS, Norm, dual_norms

N = 40


def gradient(seed: int, n: int = N) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def temporal(beta2: float = 0.9, n: int = N) -> TemporalNoise:
    return TemporalNoise({"w": torch.zeros(n)}, {"w": "frobenius"}, beta2)


def spread(width: int = 4, n: int = N, beta2: float = 0.0) -> SpreadNoise:
    return SpreadNoise({"w": torch.zeros(n)}, {"w": "frobenius"}, beta2, width)


def rows(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(values)[:, None]}


def see(noise: Noise, g: Tensor) -> None:
    """One step in which the mean gradient was observed."""
    noise.commit({"w": noise.observe("w", g).view(1, -1)}, is_local=False)


def test_h_follows_the_equation() -> None:
    """H = b2 H + (1 - b2) ||G - G_previous||^2 with Frobenius norms, starting at the first difference."""
    noise, expected = temporal(0.8), None
    for step in range(6):
        see(noise, gradient(step))
        if step:
            squared = float((gradient(step).double() - gradient(step - 1).double()).square().sum())
            expected = squared if expected is None else 0.8 * expected + 0.2 * squared
            assert noise.by_name()["w"] == pytest.approx(expected, rel=2.0**-18)


@pytest.mark.parametrize("norm", NORMS)
def test_differences_are_measured_in_the_dual_norm_also_of_flat_gradients(norm: Norm) -> None:
    """A hook's gradients are flat, in the order of the parameter's storage; an optimizer's have its shape."""
    parameter = torch.zeros(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    g = [gradient(seed, parameter.numel()).view(parameter.shape) for seed in range(2)]
    expected = float(dual_norms(norm, [g[1] - g[0]])[0]) ** 2
    measured, observed = (TemporalNoise({"w": parameter}, {"w": norm}, 0.9) for _ in range(2))
    for one in g:
        measured.measure({"w": one})
        see(observed, one.permute(0, 2, 3, 1).reshape(-1))
    assert measured.by_name()["w"] == pytest.approx(expected, rel=1e-5)
    assert observed.by_name()["w"] == pytest.approx(expected, rel=1e-5)


def test_the_first_gradient_says_nothing() -> None:
    noise = temporal()
    assert math.isnan(noise.observe("w", gradient(0)))
    see(noise, gradient(0))
    assert noise.by_name() == {}


def test_local_differences_are_divided_by_the_number_of_workers() -> None:
    noise = temporal()
    noise.commit(rows(10.0, 14.0, 12.0, 12.0), is_local=True)
    assert noise.by_name() == {"w": 3.0}


def test_the_first_difference_between_a_local_gradient_and_a_mean_says_nothing() -> None:
    noise = temporal()
    noise.commit(rows(8.0, 8.0), is_local=True)
    noise.commit(rows(100.0), is_local=False)
    assert noise.by_name() == {"w": 4.0}
    noise.commit(rows(4.0), is_local=False)
    assert noise.by_name() == {"w": 4.0}


def test_a_step_that_did_not_happen_leaves_no_trace() -> None:
    noise, twin = temporal(), temporal()
    for one in (noise, twin):
        see(one, gradient(0))
    noise.observe("w", torch.full((N,), math.nan))  # not committed
    assert torch.equal(noise.observe("w", gradient(1)), twin.observe("w", gradient(1)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_difference_says_nothing(value: float) -> None:
    noise = temporal()
    noise.commit(rows(2.0), is_local=False)
    noise.commit(rows(value), is_local=False)
    assert noise.by_name() == {"w": 2.0}


def test_the_gradient_is_copied() -> None:
    """DDP overwrites the bucket that the gradient is a view of."""
    noise = temporal()
    g = gradient(0)
    row = noise.observe("w", g)
    g.zero_()
    noise.commit({"w": row.view(1, -1)}, is_local=False)
    expected = (gradient(1) - gradient(0)).square().sum()
    torch.testing.assert_close(noise.observe("w", gradient(1))[0], expected, rtol=2.0**-18, atol=0)


def test_an_exchange_that_measures_every_few_steps_finds_what_an_optimizer_does() -> None:
    """Also when a step, whichever, does not happen and is tried again."""
    measured, observed = (TemporalNoise({"w": torch.zeros(N)}, {"w": "frobenius"}, 0.9, every=3) for _ in range(2))
    for step in range(12):
        measured.measure({"w": gradient(step)})
        observed.observe("w", gradient(100 + step))  # not committed
        see(observed, gradient(step))
        assert observed.by_name() == pytest.approx(measured.by_name(), rel=1e-6)
    assert list(measured.by_name()) == ["w"]


def test_a_spread_taken_every_few_steps_averages_over_as_many_steps() -> None:
    noise = SpreadNoise({"w": torch.zeros(N)}, {"w": "frobenius"}, 0.9, every=3)
    found = []
    for step in range(6):
        local = [gradient(2 * step), gradient(2 * step + 1)]
        mean = (local[0] + local[1]) / 2
        assert noise.is_due == (step % 3 == 2)
        due = {"w": torch.stack([noise.compare("w", g, mean) for g in local])} if noise.is_due else {}
        noise.commit(due, is_local=False)
        if due:
            found.append(sum(float((g - mean).double().square().sum()) for g in local))
    assert noise.by_name()["w"] == pytest.approx(0.9**3 * found[0] + (1 - 0.9**3) * found[1], rel=1e-5)


def test_a_constant_gradient_has_no_noise() -> None:
    noise = temporal()
    for _ in range(3):
        see(noise, gradient(0))
    assert noise.by_name() == {"w": 0.0}


def test_an_independent_gradient_counts_for_its_own_step_only() -> None:
    noise = IndependentNoise({"w": torch.zeros(N)}, {"w": "frobenius"}, 0.0)
    noise.measure({"w": gradient(0)})
    assert noise.by_name() == {}
    noise.keep({"w": gradient(1)})
    noise.measure({"w": gradient(2)})
    expected = float((gradient(2) - gradient(1)).double().square().sum())
    assert noise.by_name()["w"] == pytest.approx(expected, rel=1e-6)
    noise.measure({"w": gradient(3)})  # nothing was kept: H stays
    assert noise.by_name()["w"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_the_spread_where_the_mean_is_known_is_exact(num_ranks: int) -> None:
    """2 / N * sum ||g - mean||^2 / (N - 1), in float64 beside float32."""
    noise = spread()
    g = torch.stack([gradient(rank) for rank in range(num_ranks)])
    mean = g.mean(dim=0)
    noise.commit({"w": torch.stack([noise.compare("w", one, mean) for one in g])}, is_local=False)
    expected = 2 / num_ranks * float((g.double() - g.double().mean(dim=0)).square().sum()) / (num_ranks - 1)
    assert noise.by_name()["w"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_the_spread_of_projections_is_unbiased_and_varies_as_documented(num_ranks: int) -> None:
    """One set of gradients, new signs in each of 1,500 steps: mean the exact spread, relative deviation
    sqrt(2 / (M (N - 1))), which 1,500 draws know to 2 to 5 % (the square of few normal numbers has long tails)."""
    n, width, steps = 5_000, 4, 1_500
    noise = spread(width, n)
    g = torch.stack([gradient(rank, n) for rank in range(num_ranks)]) + gradient(99, n)  # and a common part
    found = []
    for _ in range(steps):
        noise.commit({"w": torch.stack([noise.observe("w", one) for one in g])}, is_local=True)
        found.append(noise.by_name()["w"])
    exact = 2 / num_ranks * float((g - g.mean(dim=0)).double().square().sum()) / (num_ranks - 1)
    deviation = math.sqrt(2 / (width * (num_ranks - 1)))
    relative = torch.tensor(found) / exact
    assert float(relative.mean()) == pytest.approx(1.0, abs=5 * deviation / math.sqrt(steps))
    assert float(relative.std()) == pytest.approx(deviation, rel=0.15)


def test_all_estimators_estimate_the_same() -> None:
    """Gradients with variance 1 a coordinate on each of 4 workers, no drift: H = 2 n / 4 for all of them.

    20,000 coordinates: relative standard deviation of a sum of squares 1 % to 2 %; of the 300 steps' projections 2.4 %.
    """
    n, num_ranks = 20_000, 4
    expected = 2 * n / num_ranks

    def local(step: int) -> list[Tensor]:
        return [gradient(1000 * step + rank, n) for rank in range(num_ranks)]

    independent = IndependentNoise({"w": torch.zeros(n)}, {"w": "frobenius"}, 0.0)
    independent.keep({"w": torch.stack(local(1)).mean(dim=0)})
    independent.measure({"w": torch.stack(local(2)).mean(dim=0)})

    of_mean = temporal(0.0, n)
    of_local = [temporal(0.0, n) for _ in range(num_ranks)]
    for step in (1, 2):
        see(of_mean, torch.stack(local(step)).mean(dim=0))
        seen = torch.stack([one.observe("w", g) for one, g in zip(of_local, local(step), strict=True)])
        for one in of_local:
            one.commit({"w": seen}, is_local=True)

    projected, total = spread(4, n), 0.0
    for step in range(300):
        projected.commit({"w": torch.stack([projected.observe("w", g) for g in local(step)])}, is_local=True)
        total += projected.by_name()["w"] / 300

    assert independent.by_name()["w"] == pytest.approx(expected, rel=0.05)
    assert of_mean.by_name()["w"] == pytest.approx(expected, rel=0.05)
    assert of_local[0].by_name()["w"] == pytest.approx(expected, rel=0.05)
    assert total == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("kind", [TemporalNoise, IndependentNoise, SpreadNoise])
def test_a_loaded_state_continues_bit_identically(kind: type[Noise]) -> None:
    def make() -> Noise:
        return kind({"w": torch.zeros(N)}, {"w": "frobenius"}, 0.9)

    whole, first, second = make(), make(), make()
    for step in range(6):
        if step == 3:
            second.load_state_dict(first.state_dict())
        for one in (whole, first if step < 3 else second):
            observed = [one.observe("w", gradient(step)), one.observe("w", gradient(step))]
            one.commit({"w": torch.stack(observed) + torch.tensor([[0.0], [1.0]])}, is_local=True)
    assert whole.by_name()
    assert second.by_name() == whole.by_name()


def test_h_survives_a_change_of_the_number_of_workers_and_so_of_the_estimator() -> None:
    one, several = temporal(), spread()
    one.take({"w": torch.tensor(3.0)}, 0.9)
    several.load_state_dict(one.state_dict())
    assert several.by_name() == {"w": 3.0}
    several.commit({"w": torch.stack([several.observe("w", gradient(seed)) for seed in range(2)])}, is_local=True)
    again = temporal()
    again.load_state_dict(several.state_dict())
    assert again.by_name() == several.by_name() != {"w": 3.0}
    see(again, gradient(0))  # nothing to compare with yet
    assert again.by_name() == several.by_name()


def test_a_step_in_which_nobody_saw_a_gradient_changes_nothing() -> None:
    """The dense step that settles residuals: what comes before it is local, what comes after it is a mean."""
    noise = temporal(0.0)
    for seed in range(2):
        noise.commit({"w": noise.observe("w", gradient(seed)).view(1, -1)}, is_local=True)
    before = noise.by_name()
    noise.commit({}, is_local=False)
    see(noise, 100 * gradient(2))  # against a local gradient: says nothing
    assert noise.by_name() == before


def test_what_was_kept_flat_or_shaped_can_be_continued_from_either() -> None:
    """Saved under compression, whose gradients are flat, and continued without, and the other way round."""
    parameter = torch.zeros(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    g = [gradient(seed, parameter.numel()).view(parameter.shape) for seed in range(2)]

    def make() -> TemporalNoise:
        return TemporalNoise({"w": parameter}, {"w": "frobenius"}, 0.0)

    flat = [one.permute(0, 2, 3, 1).reshape(-1) for one in g]
    first, second = make(), make()
    see(first, flat[0])
    second.load_state_dict(first.state_dict())
    second.measure({"w": g[1]})
    third, fourth = make(), make()
    third.measure({"w": g[0]})
    fourth.load_state_dict(third.state_dict())
    see(fourth, flat[1])
    expected = float((g[1] - g[0]).double().square().sum())
    assert second.by_name()["w"] == pytest.approx(expected, rel=1e-5)
    assert fourth.by_name()["w"] == pytest.approx(expected, rel=1e-5)


def test_what_was_not_measured_is_missing() -> None:
    net = nn.Linear(3, 2)
    noise = TemporalNoise(dict(net.named_parameters()), {"weight": "spectral", "bias": "rms"}, 0.9)
    for seed in range(2):
        noise.measure({"bias": gradient(seed, 2)})
    assert set(noise.by_name()) == {"bias"}


@pytest.mark.parametrize("beta2", [1.0, -0.1, math.nan])
def test_impossible_averages_are_refused(beta2: float) -> None:
    with pytest.raises(ConfigError, match=r"noise\.beta2: got .*wanted a number from 0 to below 1"):
        temporal(beta2)


@pytest.mark.parametrize("every", [1, 3])
def test_a_mean_an_optimizer_measured_and_a_local_gradient_are_not_compared(every: int) -> None:
    """Measured without an exchange and continued in one whose gradients are local, and the other way round."""

    def make() -> TemporalNoise:
        return TemporalNoise({"w": torch.zeros(N)}, {"w": "frobenius"}, 0.0, every)

    def see_local(noise: Noise, g: Tensor) -> None:
        noise.commit({"w": noise.observe("w", g).view(1, -1)}, is_local=True)

    def measure(noise: TemporalNoise, g: Tensor) -> None:
        noise.measure({"w": g})

    for before, after in ((measure, see_local), (see_local, measure)):
        first, second = make(), make()
        for seed in range(2 * every - 1):  # the next step measures
            before(first, gradient(seed))
        second.load_state_dict(first.state_dict())
        after(second, 100 * gradient(9))
        assert second.by_name() == first.by_name()
        for seed in range(10, 10 + every):
            after(second, gradient(seed))
        assert second.by_name() != first.by_name()
