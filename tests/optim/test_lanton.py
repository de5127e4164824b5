"""Learning-rate ratios from gradient noise."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distrobust.optim.lanton import default_groups, mean_by_layer, rate_ratios, set_rates

names = st.sampled_from("abcdefgh")
noises = st.dictionaries(names, st.floats(0, 1e12), min_size=1)
alphas = st.floats(1e-3, 1e3)


@given(noises, alphas)
def test_ratios_follow_the_equation(noise: dict[str, float], alpha: float) -> None:
    """sqrt(a / a_max), a = alpha / sqrt(alpha^2 + H)."""
    ratios = rate_ratios(noise, dict.fromkeys(noise, "one"), alpha)
    quietest = min(noise.values())
    for name, h in noise.items():
        assert ratios[name] == pytest.approx(((alpha**2 + quietest) / (alpha**2 + h)) ** 0.25, rel=1e-12)


@given(noises, alphas)
def test_the_quietest_of_each_group_moves_at_the_full_rate_and_none_faster(
    noise: dict[str, float], alpha: float
) -> None:
    groups = {name: "even" if ord(name) % 2 == 0 else "odd" for name in noise}
    ratios = rate_ratios(noise, groups, alpha)
    assert all(0.0 < ratio <= 1.0 for ratio in ratios.values())
    for group in set(groups.values()):
        members = [name for name in noise if groups[name] == group]
        assert ratios[min(members, key=noise.__getitem__)] == 1.0


@given(noises, alphas)
def test_more_noise_never_means_a_higher_rate(noise: dict[str, float], alpha: float) -> None:
    ratios = rate_ratios(noise, dict.fromkeys(noise, "one"), alpha)
    ordered = sorted(noise, key=noise.__getitem__)
    assert all(ratios[a] >= ratios[b] for a, b in pairwise(ordered))


def test_groups_do_not_touch_each_other() -> None:
    groups = {"a": "matrix", "b": "matrix", "c": "vector", "d": "vector"}
    alone = rate_ratios({"a": 1.0, "b": 4.0}, {"a": "matrix", "b": "matrix"}, 0.1)
    together = rate_ratios({"a": 1.0, "b": 4.0, "c": 1e-9, "d": 1e9}, groups, 0.1)
    assert {name: together[name] for name in alone} == alone


def test_a_parameter_without_a_measurement_moves_at_the_full_rate() -> None:
    assert rate_ratios({}, {"a": "matrix"}, 1.0) == {"a": 1.0}
    assert rate_ratios({"a": 3.0}, {"a": "matrix", "b": "matrix"}, 1.0) == {"a": 1.0, "b": 1.0}


def test_equal_noise_leaves_the_base_rate_alone() -> None:
    assert set(rate_ratios({"a": 5.0, "b": 5.0}, {"a": "x", "b": "x"}, 0.3).values()) == {1.0}


def test_weights_are_matrices_and_biases_and_norms_are_vectors() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    groups = default_groups(dict(net.named_parameters()))
    assert {name for name, group in groups.items() if group == "matrix"} == {"0.weight", "3.weight"}
    assert {name for name, group in groups.items() if group == "vector"} == {"0.bias", "1.weight", "1.bias", "3.bias"}


def test_rates_are_set_by_name_and_base_elsewhere() -> None:
    p = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.SGD(
        [{"params": [p[0]], "name": "a"}, {"params": [p[1]], "name": "b"}, {"params": [p[2]]}], lr=9.0
    )
    for _ in range(2):  # the base is an argument: rates do not decay by being set again
        set_rates(optimizer, 0.2, {"a": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.2]


def test_mean_by_layer_averages_over_the_first_part_of_the_name() -> None:
    ratios = {"conv.0.weight": 0.5, "conv.1.weight": 0.7, "head": 1.0}
    means = mean_by_layer(ratios)
    assert set(means) == {"conv", "head"}
    assert math.isclose(means["conv"], 0.6)
    assert means["head"] == 1.0
