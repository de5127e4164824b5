"""Links, devices, availability and a round on the virtual clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrobust.errors import DataError
from distrobust.federated import draws, timeline
from distrobust.federated.availability import Availability
from distrobust.federated.draws import Purpose
from distrobust.federated.links import Links
from distrobust.federated.partition import Partition
from distrobust.federated.settings import AvailabilityConfig, LinksConfig
from distrobust.federated.timeline import ARRIVED, LATE, LOST, SURPLUS, Course

MANY = np.arange(20_000)
EXACT: dict[str, Any] = {"bandwidth_spread": 0, "latency_spread": 0, "compute_spread": 0}


def test_draws_are_functions_of_their_counters() -> None:
    drawn = draws.uniform(1, Purpose.SELECTION, 3, MANY)
    assert np.array_equal(draws.uniform(1, Purpose.SELECTION, 3, MANY[100:110]), drawn[100:110])
    assert 0.0 <= drawn.min() < drawn.max() < 1.0
    # standard error of a mean of 20,000 uniforms is 0.002, of a correlation 0.007
    assert abs(drawn.mean() - 0.5) < 0.01
    others = [
        draws.uniform(*counters, MANY)
        for counters in ((2, Purpose.SELECTION, 3), (1, Purpose.SELECTION, 4), (1, Purpose.BATCHES, 3))
    ]
    assert max(abs(np.corrcoef(drawn, other)[0, 1]) for other in (*others, np.roll(drawn, 1))) < 0.04
    normal = draws.normal(1, Purpose.LATENCY, MANY)
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    assert np.isfinite(normal).all()


def test_links_are_log_normal_around_their_medians_and_asymmetric() -> None:
    links = Links(LinksConfig(download_mbit=8, upload_mbit=2, latency_s=0, bandwidth_spread=0.5), 0)
    start, size = np.zeros(len(MANY)), np.full(len(MANY), 1e6)
    down, up = (links.finished(direction, MANY, start, size) for direction in ("download", "upload"))
    assert np.median(down) == pytest.approx(1.0, rel=0.03)
    assert np.median(up) == pytest.approx(4.0, rel=0.03)
    assert np.log(down).std() == pytest.approx(0.5, rel=0.03)
    assert abs(np.corrcoef(np.log(down), np.log(up))[0, 1]) < 0.04


def course(deadline_s: float | None = None, wanted: int = 3, drop_out: float = 0.0, **settings: Any) -> Course:
    """Three clients, 1 MB down in 1 s, 10, 20 or 30 rows at 10 a second, 0.5 MB up in 2 s, latency 0.25 s each way."""
    links = Links(
        LinksConfig(
            **{**EXACT, "download_mbit": 8, "upload_mbit": 2, "latency_s": 0.25, "examples_per_s": 10, **settings}
        ),
        0,
    )
    return timeline.run(
        links,
        np.array([3, 5, 8]),
        100.0,
        np.full(3, 10**6),
        500_000,
        np.array([10, 20, 30]),
        wanted=wanted,
        deadline_s=deadline_s,
        drop_out=drop_out,
        seed=0,
        round_number=4,
    )


def test_time_splits_into_download_compute_upload_and_wait() -> None:
    found = course()
    assert found.download_s.tolist() == [1.25] * 3
    assert found.compute_s == pytest.approx([1, 2, 3])
    assert found.upload_s == pytest.approx([2.25] * 3)
    assert found.wait_s == pytest.approx([2, 1, 0])
    assert found.duration_s == pytest.approx(6.5)
    assert found.fate.tolist() == [ARRIVED] * 3
    assert found.download_bytes.tolist() == [10**6] * 3
    assert found.upload_bytes.tolist() == [500_000] * 3


def test_stragglers_are_cut_off_at_the_deadline_and_what_they_sent_is_counted() -> None:
    found = course(deadline_s=5.0)
    assert found.fate.tolist() == [ARRIVED, LATE, LATE]
    assert found.duration_s == 5.0
    # the second began to send at 3.5 s and the third at 4.5 s, at 250 kB a second
    assert found.upload_bytes.tolist() == pytest.approx([500_000, 375_000, 125_000], abs=1)
    assert found.download_bytes.tolist() == [10**6] * 3
    early = course(deadline_s=0.75)
    assert early.fate.tolist() == [LATE] * 3
    assert early.download_bytes.tolist() == pytest.approx([500_000] * 3, abs=1)
    assert not early.has_model.any()
    assert early.upload_bytes.sum() == 0
    assert early.fastest_s == pytest.approx(4.5)


def test_a_deadline_is_not_waited_for_when_nobody_is_left() -> None:
    assert course(deadline_s=60.0, wanted=4).duration_s == pytest.approx(6.5)
    lost = course(deadline_s=60.0, drop_out=1.0)
    assert lost.fate.tolist() == [LOST] * 3
    assert lost.duration_s == pytest.approx(float(max(lost.download_s + lost.compute_s + lost.upload_s)))
    assert lost.duration_s < 6.5
    assert course(deadline_s=5.0, wanted=4).duration_s == 5.0  # two are still under way


def test_over_selection_ends_the_round_with_the_first_to_arrive() -> None:
    found = course(wanted=2)
    assert found.fate.tolist() == [ARRIVED, ARRIVED, SURPLUS]
    assert found.duration_s == pytest.approx(5.5)
    assert found.upload_bytes[2] == pytest.approx(250_000, abs=1)


def test_a_lost_upload_has_sent_a_part() -> None:
    found = course(drop_out=1.0)
    assert found.fate.tolist() == [LOST] * 3
    assert ((found.upload_bytes >= 0) & (found.upload_bytes < 500_000)).all()
    assert found.upload_bytes.any()
    assert found.has_model.all()


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["trace,start_s,stop_s,download_mbit,upload_mbit", *lines]) + "\n")
    return path


def test_traces_give_bandwidth_over_time_with_outages_and_begin_again(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", "a,0,1,8,8", "a,1,3,0,8", "a,3,4,16,8", "b,0,2,80,80")
    links = Links(LinksConfig(traces=file, latency_s=0), 0)
    clients = np.array([0, 1, 2])

    def finished(start: float, size: float) -> list[float]:
        result: list[float] = links.finished("download", clients, np.full(3, start), np.full(3, size)).tolist()
        return result

    assert finished(0.0, 1e6) == pytest.approx([1.0, 0.1, 1.0])  # client 2 follows trace a again
    assert finished(0.0, 2e6) == pytest.approx([3.5, 0.2, 3.5])
    assert finished(0.5, 3e6) == pytest.approx([4.5, 0.8, 4.5])  # 0.5 MB, the outage, 2 MB, and 0.5 MB of the next turn
    assert finished(2.0, 0.0) == pytest.approx([2.0, 2.0, 2.0])
    by = links.sent_by("download", clients, np.zeros(3), np.full(3, 2e6), np.full(3, 3.25))
    assert by == pytest.approx([1.5e6, 2e6, 1.5e6])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,0,1,8,8", "a,2,3,8,8"], r"line 3: trace 'a' has a gap: start_s is 2, the rows before end at 1 s"),
        (["a,0,2,8,8", "a,1,3,8,8"], "line 3: trace 'a' has an overlap"),
        (["a,1,2,8,8"], "line 2: trace 'a' has a gap"),
        (["a,0,1,8,-2"], "line 2: trace 'a' has a bandwidth of -2 Mbit/s"),
        (["a,0,0,8,8"], "line 2: trace 'a': stop_s 0 is not after start_s 0"),
        (["a,0,1,nan,8"], "line 2: trace 'a' has a value that is not finite"),
        (["a,0,1,fast,8"], "line 2: got .* wanted numbers"),
        (["a,0,1,8"], "line 2: got .* wanted numbers"),
        (["a,0,1,8,0"], "trace 'a' never has any upload bandwidth"),
        ([], "no rows"),
    ],
)
def test_a_bad_trace_is_one_clear_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Links(LinksConfig(traces=write(tmp_path / "t.csv", *lines)), 0)
    assert "\n" not in str(caught.value)


def test_other_columns_and_missing_traces_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="line 1: got columns"):
        Links(LinksConfig(traces=tmp_path / "t.csv"), 0)
    with pytest.raises(DataError, match="cannot be read"):
        Links(LinksConfig(traces=tmp_path / "none.csv"), 0)


def availability(registered: int = 20_000, **settings: Any) -> Availability:
    """Client i has one row, of class i modulo 10."""
    labels = np.arange(registered) % 10
    return Availability(AvailabilityConfig(**settings), 0, Partition(registered, lambda c: np.array([c])), labels, 10)


@pytest.mark.parametrize("name", ["bernoulli", "markov", "diurnal", "labels"])
def test_clients_are_there_for_their_share_of_rounds(name: str) -> None:
    there = availability(name=name, share=0.3, day_s=100.0)
    shares = [there.reachable(MANY, number, 13.0 * number).mean() for number in range(30)]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.01)


def test_a_markov_chain_stays_as_it_is_and_knows_its_state_without_a_history() -> None:
    there = availability(name="markov", share=0.3, stay=0.9)
    states = np.array([there.reachable(MANY, number, 0.0) for number in range(40)])
    assert states[0].mean() == pytest.approx(0.3, abs=0.02)
    assert np.corrcoef(states[20], states[21])[0, 1] == pytest.approx(0.9, abs=0.03)
    assert np.corrcoef(states[20], states[25])[0, 1] == pytest.approx(0.9**5, abs=0.05)
    some = MANY[[7, 19, 500]]
    assert np.array_equal(there.reachable(some, 33, 0.0), states[33][some])


def test_diurnal_clients_come_back_after_a_day() -> None:
    there = availability(name="diurnal", share=0.5, day_s=1000.0)
    probability = [there._probability(MANY[:50], time) for time in (0.0, 1000.0, 500.0)]
    assert np.allclose(probability[0], probability[1])
    assert np.allclose(probability[0] + probability[2], 1.0)


def test_availability_by_label_prefers_high_classes() -> None:
    there = availability(name="labels", share=0.5).reachable(MANY, 3, 0.0)
    assert not there[MANY % 10 == 0].any()
    assert there[MANY % 10 == 9].all()


@pytest.mark.parametrize("registered", [50, 2000, 1_000_000])
def test_selection_takes_distinct_reachable_clients_alike(registered: int) -> None:
    there = availability(20, name="bernoulli", share=0.5)
    there._partition = Partition(registered, lambda c: np.array([0]))
    chosen = [there.select(10, number, 0.0) for number in range(300)]
    for number, own in enumerate(chosen):
        assert len(set(own.tolist())) == 10
        assert own.tolist() == sorted(own.tolist())
        assert there.reachable(own, number, 0.0).all()
    # 3,000 draws: the mean of a uniform is known to 0.0053
    assert np.mean(np.concatenate(chosen) / registered) == pytest.approx(0.5, abs=0.03)


def test_few_who_can_be_reached_are_found_among_many() -> None:
    there = availability(20_000, name="bernoulli", share=0.001)
    found = there.select(100, 0, 0.0)
    assert np.array_equal(found, np.flatnonzero(there.reachable(MANY, 0, 0.0)))
    assert 5 < len(found) < 50
