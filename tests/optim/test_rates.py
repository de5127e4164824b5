"""Learning-rate ratios from gradient noise."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrobust.errors import ConfigError
from distrobust.optim.rates import check_alpha, mean_by_layer, norm_by_layer, rate_ratios

noises = st.lists(st.floats(0, 1e12), min_size=1, max_size=8)
alphas = st.floats(1e-3, 1e3)


def ratios(noise: list[float], alpha: float, groups: list[int] | None = None) -> list[float]:
    numbers = torch.tensor(groups if groups is not None else [0] * len(noise))
    result: list[float] = rate_ratios(torch.tensor(noise, dtype=torch.float64), numbers, alpha).tolist()
    return result


@given(noises, alphas)
def test_ratios_follow_the_equation(noise: list[float], alpha: float) -> None:
    """sqrt(a / a_max), a = alpha / sqrt(alpha^2 + H)."""
    for ratio, h in zip(ratios(noise, alpha), noise, strict=True):
        assert ratio == pytest.approx(((alpha**2 + min(noise)) / (alpha**2 + h)) ** 0.25, rel=1e-12)


@given(noises, alphas)
def test_the_quietest_of_each_group_moves_at_the_full_rate_and_none_faster(noise: list[float], alpha: float) -> None:
    groups = [i % 2 for i in range(len(noise))]
    found = ratios(noise, alpha, groups)
    assert all(0.0 < ratio <= 1.0 for ratio in found)
    for group in set(groups):
        members = [i for i in range(len(noise)) if groups[i] == group]
        assert found[min(members, key=noise.__getitem__)] == 1.0


@given(noises, alphas)
def test_more_noise_never_means_a_higher_rate(noise: list[float], alpha: float) -> None:
    found = ratios(noise, alpha)
    ordered = sorted(range(len(noise)), key=noise.__getitem__)
    assert all(found[a] >= found[b] for a, b in pairwise(ordered))


@given(st.lists(st.floats(1e-6, 1e6), min_size=2))
def test_far_below_the_noise_ratios_do_not_depend_on_the_scale_of_the_loss(noise: list[float]) -> None:
    """alpha^2 is at most 1e-12 of any H: relative error below 1e-12."""
    assert ratios(noise, 1e-9) == pytest.approx(ratios([1e4 * h for h in noise], 1e-9), rel=1e-10)


def test_groups_do_not_touch_each_other() -> None:
    assert ratios([1.0, 4.0, 1e-9, 1e9], 0.1, [0, 0, 1, 1])[:2] == ratios([1.0, 4.0], 0.1)


def test_a_parameter_without_a_measurement_moves_at_the_full_rate() -> None:
    assert ratios([math.nan], 1.0) == [1.0]
    assert ratios([3.0, math.nan], 1.0) == [1.0, 1.0]
    assert ratios([math.nan, 3.0, 12.0], 1.0)[1:] == ratios([3.0, 12.0], 1.0)


def test_equal_noise_leaves_the_base_rate_alone() -> None:
    assert ratios([5.0, 5.0], 0.3) == [1.0, 1.0]


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_impossible_alphas_are_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"noise\.alpha: got .*wanted a finite number above 0"):
        check_alpha(alpha)


def test_mean_by_layer_averages_over_the_first_part_of_the_name() -> None:
    ratios = {"conv.0.weight": 0.5, "conv.1.weight": 0.7, "head": 1.0}
    means = mean_by_layer(ratios)
    assert set(means) == {"conv", "head"}
    assert math.isclose(means["conv"], 0.6)
    assert means["head"] == 1.0


def test_norm_by_layer_is_the_norm_of_all_parameters_of_the_layer_as_one() -> None:
    """H of a Frobenius norm is a sum over coordinates, so however a layer is cut into parameters."""
    differences = {"conv.0.weight": [3.0, 4.0], "conv.1.weight": [12.0], "head": [2.0]}
    norms = norm_by_layer({name: math.hypot(*values) ** 2 for name, values in differences.items()})
    assert list(norms) == ["conv", "head"]
    assert norms == pytest.approx({"conv": 13.0, "head": 2.0}, rel=1e-12)


def test_nothing_measured_is_nothing_by_layer() -> None:
    assert norm_by_layer({}) == mean_by_layer({}) == {}
