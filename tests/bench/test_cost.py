"""The laws of the cost model."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrobust.bench import cost
from distrobust.bench.cost import Cost, Local

workers = st.integers(1, 1024)
sizes = st.floats(1e3, 1e9)
rates = st.floats(1e4, 1e11)
times = st.floats(0.0, 10.0)
locals_ = st.builds(Local, times, st.floats(0.0, 0.1))
exchanges = st.sampled_from([cost.dense, cost.all_gather, cost.sharded])
costs = st.builds(Cost, st.just("any"), times, sizes, st.integers(0, 2000))


@given(exchanges, workers, sizes, locals_, rates, rates, times)
def test_a_faster_link_never_makes_a_step_slower(
    exchange: object, n: int, size: float, local: Local, rate: float, other: float, latency: float
) -> None:
    each = exchange(n, size, local)  # type: ignore[operator]
    slow, fast = sorted((rate, other))
    assert each.seconds(fast, latency) <= each.seconds(slow, latency)
    assert each.seconds(fast, 0.0) <= each.seconds(fast, latency)


@given(exchanges, sizes, locals_)
def test_one_worker_sends_nothing_and_waits_for_nobody(exchange: object, size: float, local: Local) -> None:
    alone = exchange(1, size, local)  # type: ignore[operator]
    assert alone.sent_bytes == 0
    assert alone.rounds == 0


@given(workers, sizes, locals_)
def test_more_workers_never_send_less_by_any_exchange(n: int, size: float, local: Local) -> None:
    for exchange in (cost.dense, cost.all_gather, cost.sharded):
        assert exchange(n, size, local).sent_bytes <= exchange(n + 1, size, local).sent_bytes


@given(workers, sizes, locals_)
def test_dense_and_sharded_stay_below_two_messages_however_many_workers(n: int, size: float, local: Local) -> None:
    assert cost.dense(n, size, local).sent_bytes < 2 * size
    assert cost.sharded(n, size, local).sent_bytes < 2 * size
    assert cost.all_gather(n, size, local).sent_bytes == (n - 1) * size


@given(costs, costs, st.floats(0.0, 0.1))
def test_the_crossover_is_where_the_lines_meet(sparse: Cost, dense: Cost, latency: float) -> None:
    crossing = cost.crossover([sparse], dense, latency)
    if 0.0 < crossing < math.inf:
        mine, theirs = sparse.seconds(crossing, latency), dense.seconds(crossing, latency)
        assert mine == pytest.approx(theirs, rel=1e-6)
        # a little to either side; where the lines are nearly parallel rounding decides
        if abs(sparse.sent_bytes - dense.sent_bytes) / crossing > 1e-6 * theirs:
            assert sparse.seconds(crossing / 2, latency) < dense.seconds(crossing / 2, latency)
            assert sparse.seconds(crossing * 2, latency) > dense.seconds(crossing * 2, latency)


@given(costs, times)
def test_fewer_bytes_in_no_more_time_always_pay_and_more_bytes_never_do(dense: Cost, latency: float) -> None:
    half = Cost("half", dense.local_s, dense.sent_bytes / 2, dense.rounds)
    assert cost.crossover([half], dense, latency) == math.inf
    assert cost.crossover([dense], half, latency) == 0.0
    assert cost.crossover([], dense, latency) == 0.0


@given(st.lists(costs, min_size=1, max_size=4), costs, st.floats(0.0, 0.1), rates)
def test_the_best_of_several_decides(sparse: list[Cost], dense: Cost, latency: float, rate: float) -> None:
    lighter = [each for each in sparse if each.sent_bytes < dense.sent_bytes]
    crossing = cost.crossover(sparse, dense, latency)
    if lighter and rate < 0.999 * crossing:
        assert cost.fastest(lighter, rate, latency).seconds(rate, latency) <= dense.seconds(rate, latency) * (1 + 1e-9)


@given(st.floats(0.0, 1.0), st.floats(0.0, 0.1))
def test_a_fit_finds_the_line(fixed: float, slope: float) -> None:
    found = cost.fit({n: fixed + n * slope for n in (2, 6, 32)})
    assert found.decoding(100) == pytest.approx(fixed + 100 * slope, abs=1e-9)


def test_a_fit_of_noise_never_says_that_decoding_gives_time_back() -> None:
    assert cost.fit({2: 0.3, 6: 0.2}) == Local(0.25, 0.0)
    assert cost.fit({1: 0.3}) == Local(0.3, 0.0)
