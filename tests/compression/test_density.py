"""Density over the run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrobust.compression.density import LADDER, Schedule
from distrobust.errors import ConfigError

density = st.floats(1e-5, 1.0)


def test_the_ladder_has_the_papers_values() -> None:
    assert LADDER == (0.25, 0.0625, 0.015625, 0.004, 0.001)


def test_every_rung_lasts_equally_long_and_rungs_at_or_below_the_target_are_left_out() -> None:
    warmup = Schedule(0.004, 30)
    assert [warmup.at(step) for step in range(32)] == [0.25] * 10 + [0.0625] * 10 + [0.015625] * 10 + [0.004] * 2


def test_all_rungs_above_the_smallest_target() -> None:
    assert [Schedule(0.0005, 5).at(step) for step in range(6)] == [*LADDER, 0.0005]


@given(density, st.integers(0, 500))
def test_density_never_rises_and_never_falls_below_the_target(target: float, num_steps: int) -> None:
    densities = [Schedule(target, num_steps).at(step) for step in range(num_steps + 2)]
    assert densities == sorted(densities, reverse=True)
    assert min(densities) == densities[-1] == densities[num_steps] == target
    assert set(densities) <= {target, *LADDER}


@given(density)
def test_without_warmup_steps_the_target_holds_from_the_first_step(target: float) -> None:
    assert Schedule(target).at(0) == target


@pytest.mark.parametrize("impossible", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_an_impossible_density_is_refused_where_it_is_made(impossible: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"compress.density: got {impossible}, wanted a fraction above 0 and at most 1"
    ):
        Schedule(impossible)
    with pytest.raises(ConfigError, match=r"compress\.density"):
        Schedule(0.001, 10, (0.25, impossible))


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compress: got -1 warmup_steps"):
        Schedule(0.001, -1)
