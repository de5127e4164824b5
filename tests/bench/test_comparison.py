"""From what hosts measured to the rows and lines a person reads."""

import pytest

from distrobust.bench import comparison
from distrobust.bench.comparison import Comparison
from distrobust.bench.methods import DENSE, FLOOR, Method, standard
from distrobust.errors import ConfigError
from distrobust.lab.link import Link

METHODS = [Method(FLOOR, "a:b"), Method(DENSE, "a:b"), Method("ours", "a:b")]


def _record(seconds: float, tcp: int, wire: int | None = None) -> dict[str, float | None]:
    packets = None if wire is None else 10
    return {"seconds": seconds, "tcp_bytes": tcp, "counted_bytes": tcp - 1, "wire_bytes": wire, "packets": packets}


ROUNDS = [
    {
        FLOOR: [_record(0.1, 0, 500)] * 3,
        DENSE: [_record(9.0, 1_000_000, 1_100_000)] * 3,
        "ours": [_record(s, 1000, 1100) for s in (0.2, 0.3, 0.4)],
    },
    {
        FLOOR: [_record(0.1, 0, 500)] * 3,
        DENSE: [_record(8.0, 1_000_000, 1_100_000)] * 3,
        "ours": [_record(s, 3000, 3300) for s in (0.5, 0.1, 0.1)],
    },
]


def test_a_step_is_as_long_as_its_slowest_rank_and_bytes_are_a_ranks() -> None:
    rows = {row.name: row for row in comparison.rows(METHODS, ROUNDS)}
    ours = rows["ours"]
    assert (ours.lower_s, ours.median_s, ours.upper_s) == pytest.approx((0.35, 0.4, 0.45))  # of 0.5, 0.3, 0.4
    assert ours.minus_floor_s == pytest.approx(0.3)
    assert ours.payload_bytes == 2000
    assert ours.wire_bytes == 2200
    assert ours.header_bytes == 660
    assert rows[DENSE].median_s == 9.0


def test_without_a_lab_the_payloads_time_on_the_link_is_added() -> None:
    bare = [
        {
            name: [{**record, "wire_bytes": None, "packets": None} for record in records]
            for name, records in rank.items()
        }
        for rank in ROUNDS
    ]
    rows = {row.name: row for row in comparison.rows(METHODS, bare, computed_bytes_per_s=1e6)}
    assert rows[DENSE].median_s == pytest.approx(9.0 + 1.0)
    assert rows[DENSE].wire_bytes is None
    shown = Comparison(Link(8e6), 2, 3, True, list(rows.values()), {}, bare)
    text = "\n".join(comparison.table(shown))
    assert "times computed" in text
    assert "the time of the payload on the link was added" in text


def test_the_table_compares_with_dense_and_says_what_was_left_out() -> None:
    rows = comparison.rows(METHODS, ROUNDS)
    shown = Comparison(Link(100e6), 2, 3, False, rows, {"PowerSGD": "ended by signal 6"}, ROUNDS)
    lines = comparison.table(shown)
    ours = next(line for line in lines if line.startswith("ours")).split()
    assert ours[1] == "0.400"
    assert ours[-1] == "500"  # times fewer bytes on the wire: 1.1 MB against 2200
    assert "22.5" in ours  # times faster: 9.0 against 0.4
    assert "Left out: PowerSGD: ended by signal 6" in lines


@pytest.mark.parametrize(("hosts", "steps"), [(1, 5), (65, 5), (2, 0)])
def test_impossible_numbers_are_refused(hosts: int, steps: int) -> None:
    with pytest.raises(ConfigError, match="got"):
        comparison.compare(METHODS, Link(1e9), hosts, steps)


def test_there_is_one_method_for_each_density_and_value_code() -> None:
    names = [method.name for method in standard([0.01, 0.001], ["4bit", "fp16"])]
    assert len(names) == len(set(names))
    assert names[-4:] == [f"distrobust {d} %, {code}" for d in ("1", "0.1") for code in ("4bit", "fp16")]
    assert standard([0.01])[-1].options == {"density": 0.01}
