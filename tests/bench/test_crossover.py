"""The table of `bench crossover`, and the model against points, without measuring anything."""

import math
from pathlib import Path

import pytest

from distrobust.bench import crossover, crossover_plot, validation
from distrobust.bench.cost import Local
from distrobust.bench.crossover import Machine, Network
from distrobust.bench.methods import DENSE, FP16
from distrobust.bench.validation import Point
from distrobust.errors import ConfigError
from distrobust.lab.link import Link

MACHINE = Machine(
    {DENSE: Local(0.02), FP16: Local(0.05), "1 %": Local(0.1, 0.01), "0.1 %": Local(0.08, 0.002)},
    {"1 %": Local(0.15, 1e-4), "0.1 %": Local(0.12, 1e-4)},
    {"1 %": 4e5, "0.1 %": 5e4},
    25_557_032,
)
SLOW = Network(Link(100e6).payload_bytes_per_s, 1e-3)


def test_two_workers_gather_and_a_thousand_shard() -> None:
    assert MACHINE.cost("1 %", 2, SLOW).exchange == "all_gather"
    assert MACHINE.cost("1 %", 1024, SLOW).exchange == "sharded"


def test_where_sparse_does_not_pay_the_hook_runs_dense() -> None:
    assert MACHINE.cost("1 %", 2, Network(1e12, 0.0)).exchange == "dense"


def test_compression_is_faster_below_the_crossover_and_slower_above() -> None:
    for name in MACHINE.sparse:
        for rival in (DENSE, FP16):
            crossing = MACHINE.crossover(name, rival, 8, 1e-3)
            assert 0 < crossing < math.inf
            for factor, faster in ((0.9, True), (1.1, False)):
                link = Network(Link(crossing * factor).payload_bytes_per_s, 1e-3)
                sparse = [each for each in MACHINE.costs(name, 8) if each.exchange != "dense"]
                best = min(each.seconds(link.bytes_per_s, 1e-3) for each in sparse)
                assert (best < MACHINE.cost(rival, 8, link).seconds(link.bytes_per_s, 1e-3)) is faster


def test_the_table_has_a_line_for_every_number_of_workers_and_says_it_is_computed() -> None:
    lines = crossover.table(MACHINE, SLOW)
    text = "\n".join(lines)
    assert text.count("computed") == 2
    for num_workers in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        assert sum(line.split()[:1] == [str(num_workers)] for line in lines) == 2
    assert "100 Mbit/s each way, 1 ms" in text


def test_bandwidths_are_written_for_people() -> None:
    assert [crossover.bandwidth(b) for b in (0.0, 2.5e7, 3.21e9, math.inf)] == [
        "never",
        "25 Mbit/s",
        "3.21 Gbit/s",
        "always",
    ]


def test_hosts_that_share_cores_take_their_turns() -> None:
    alone = validation.predict(MACHINE, "1 %", "all_gather", 4, cores=4)
    crowded = validation.predict(MACHINE, "1 %", "all_gather", 4, cores=2)
    assert crowded.local_s == pytest.approx(2 * alone.local_s)
    assert crowded.sent_bytes == alone.sent_bytes


def _point(predicted_s: float) -> Point:
    return Point(2, "1 %", "all_gather", 1.0, 0.9, 1.1, predicted_s, 0.3, 4e5, 4e5)


@pytest.mark.parametrize(("predicted_s", "verdict"), [(1.19, "all within 20 %"), (0.79, "not all within 20 %")])
def test_the_largest_error_of_a_prediction_is_printed(predicted_s: float, verdict: str) -> None:
    lines = validation.table([_point(1.0), _point(predicted_s)], SLOW)
    assert lines[-1].endswith(f": {verdict}.")
    assert f"{100 * (predicted_s - 1):+.0f} %" in lines[-1]


def test_the_plot_tells_computed_lines_from_measured_points(tmp_path: Path) -> None:
    crossover_plot.draw(tmp_path / "plot.svg", MACHINE, SLOW, [_point(1.0)])
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
    crossover_plot.draw(tmp_path / "plot.png", MACHINE, SLOW, [])
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for path in (tmp_path / "plot.jpeg2", tmp_path / "nowhere" / "plot.png"):
        with pytest.raises(ConfigError, match="--plot"):
            crossover_plot.check(path)
