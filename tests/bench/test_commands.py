"""`distrobust bench` answers mistakes in one line, before it measures anything."""

import sys
from pathlib import Path

import pytest

from distrobust import cli
from distrobust.bench import comparison
from distrobust.lab import hosts as lab


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["distrobust", "bench", *arguments])
    try:
        cli.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--link", "fast"], "link: got 'fast', wanted a bandwidth"),
        (["step", "--hosts", "1"], "--hosts"),
        (["step", "--densities", "2"], "densities: got '2'"),
        (["crossover", "--bandwidth", "1mb"], "link: got '1mb'"),
        (["crossover", "--latency", "now"], "latency: got 'now'"),
        (["crossover", "--hosts", "2,9"], "hosts: got '2,9', wanted numbers from 2 to 8"),
        (["crossover", "--plot", "plot.txt"], "--plot: got plot.txt, wanted a file that ends in .png"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_a_lab_the_step_benchmark_says_so_and_computes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen = {}

    def compare(methods: object, link: object, hosts: int, steps: int, **options: object) -> comparison.Comparison:
        seen.update(options)
        return comparison.Comparison(link, hosts, steps, not options["use_lab"], [], {}, [])  # type: ignore[arg-type]

    monkeypatch.setattr(lab, "why_not", lambda: "the slow-link lab needs root")
    monkeypatch.setattr(comparison, "compare", compare)
    assert _run(monkeypatch, "step", "--out", str(tmp_path / "step.json")) == 0
    captured = capsys.readouterr()
    assert "the slow-link lab needs root; using processes over loopback instead" in captured.err
    assert seen["use_lab"] is False
    assert "computed" in captured.out
    assert '"times": "computed from counted bytes"' in (tmp_path / "step.json").read_text()
