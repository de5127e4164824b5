"""Laws of the learning-rate schedules and of the eps ramp."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrobust.errors import ConfigError
from distrobust.optim.schedules import Schedule, batch_factor, ramp

NAMES = ["one_cycle", "slow_start_fast_decay", "cosine", "constant"]
share = st.floats(0.0, 1.0)
schedules = st.builds(Schedule, st.sampled_from(NAMES), st.floats(1e-6, 1e3), share, share)


@given(schedules, share)
def test_never_negative_and_never_above_the_peak(schedule: Schedule, u: float) -> None:
    assert 0.0 <= schedule.at(u) <= schedule.peak


@given(schedules)
def test_peak_is_reached_exactly_at_the_end_of_warmup(schedule: Schedule) -> None:
    assert schedule.at(schedule.warmup) == schedule.peak


@pytest.mark.parametrize("name", NAMES)
@given(p=st.floats(0.05, 0.95), f0=share, u=share)
def test_continuous(name: str, p: float, f0: float, u: float) -> None:
    h = 1e-6
    v = min(1.0, u + h)
    # The steepest slope is that of the rise, 1/p, or of the fall, k/(1-p) <= 4.61/(1-p); both below 100 here.
    assert abs(Schedule(name, 1.0, p, f0).at(v) - Schedule(name, 1.0, p, f0).at(u)) <= 100 * h  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["one_cycle", "slow_start_fast_decay", "cosine"])
@given(a=share, b=share)
def test_rises_until_warmup_and_falls_after(name: str, a: float, b: float) -> None:
    schedule = Schedule(name, 1.0, 0.3, 0.01)  # type: ignore[arg-type]
    low, high = min(a, b), max(a, b)
    if high <= 0.3:
        assert schedule.at(low) <= schedule.at(high)
    if low >= 0.3:
        assert schedule.at(low) >= schedule.at(high)


def test_values_written_out_from_the_formulas() -> None:
    one = Schedule("one_cycle", peak=0.4, warmup=0.2, floor=0.05)
    assert one.at(0.0) == pytest.approx(0.02)
    assert one.at(0.1) == pytest.approx(0.4 * (0.05 + 0.95 * 0.5))
    assert one.at(0.6) == pytest.approx(0.2)
    assert one.at(1.0) == 0.0
    fast = Schedule("slow_start_fast_decay", peak=0.4, warmup=0.2, floor=0.05)
    assert fast.at(0.1) == one.at(0.1)
    assert fast.at(0.6) == pytest.approx(0.04)  # exp(-ln(100) / 2) is a tenth
    assert fast.at(1.0) == pytest.approx(0.004)
    assert Schedule("cosine", 0.4, 0.2).at(0.6) == pytest.approx(0.2)
    assert Schedule("cosine", 0.4, 0.2).at(1.0) == pytest.approx(0.0, abs=1e-12)
    assert Schedule("constant", 0.4, 0.2).at(0.0) == Schedule("constant", 0.4, 0.2).at(1.0) == 0.4


def test_no_warmup_starts_at_the_peak() -> None:
    assert [Schedule(name, 0.1, warmup=0.0).at(0.0) for name in NAMES] == [0.1] * 4  # type: ignore[arg-type]


@given(share, st.floats(0.01, 1.0))
def test_ramp_is_linear_then_one(u: float, s: float) -> None:
    assert ramp(u, s) == pytest.approx(min(1.0, u / s))
    assert 0.0 <= ramp(u, s) <= 1.0


def test_ramp_of_share_zero_is_one_at_once() -> None:
    assert ramp(0.0, 0.0) == 1.0


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"name": "onecycle"}, "did you mean 'one_cycle'"),
        ({"peak": 0.0}, "schedule.peak: 0.0"),
        ({"peak": -1.0}, "above 0"),
        ({"peak": math.nan}, "schedule.peak: nan"),
        ({"peak": math.inf}, "finite"),
        ({"warmup": 20.0}, "not a percentage"),
        ({"warmup": math.nan}, "schedule.warmup: nan"),
        ({"floor": -0.1}, "schedule.floor: -0.1"),
    ],
)
def test_impossible_values_say_what_is_allowed(kwargs: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Schedule(**kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("s", [-0.1, 1.5, math.nan])
def test_impossible_ramp_share_is_refused(s: float) -> None:
    with pytest.raises(ConfigError, match="eps ramp share"):
        ramp(0.5, s)


@pytest.mark.parametrize("u", [-0.01, 1.01, math.nan])
def test_progress_outside_the_run_is_a_programming_error(u: float) -> None:
    with pytest.raises(ValueError, match="progress"):
        Schedule().at(u)
    with pytest.raises(ValueError, match="progress"):
        ramp(u, 0.5)


def test_a_rate_grows_with_the_batch_or_with_its_root() -> None:
    assert batch_factor(1024, 256, "linear") == 4.0
    assert batch_factor(1024, 256, "sqrt") == 2.0
    assert batch_factor(64, 256, "linear") == 0.25
    assert batch_factor(256, 256, "sqrt") == batch_factor(256, 256, "linear") == 1.0
