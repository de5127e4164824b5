"""What a person sees while a run is going, and at its end."""

import io
from pathlib import Path
from typing import Any

import pytest

from distrobust.metrics.console import Console, megabytes, print_summary, times

RECORDS: list[dict[str, Any]] = [
    {"event": "run", "world_size": 2, "num_parameters": 413_466, "resumed_step": 0},
    {"event": "phase", "phase": "train", "num_steps": 200, "steps_per_epoch": 100, "num_epochs": 2},
    {"event": "step", "phase": "train", "step": 100, "loss": 1.234, "density": 0.001, "sent_bytes": 2_000_000,
     "dense_bytes": 100_000_000, "nonfinite_steps": 1},
    {"event": "epoch", "phase": "train", "step": 100, "epoch": 1, "clean_accuracy": 0.7, "robust_accuracy": 0.35,
     "attack": "PGD-10 Linf 8/255"},
    {"event": "checkpoint", "phase": "train", "step": 100, "seconds": 0.1, "bytes": 1000},
    {"event": "notice", "text": "port 9400 is taken [bold]"},
]  # fmt: skip

EVALUATIONS: list[dict[str, Any]] = [
    {"event": "evaluation", "model": model, "attack": attack, "accuracy": accuracy, "low": accuracy - 0.01,
     "high": accuracy + 0.01, "samples": 2000, "seed": 7, "flags": flags}
    for model, attack, accuracy, flags in (
        ("pre-trained", "clean", 0.812, []),
        ("pre-trained", "PGD-20 Linf 8/255", 0.02, []),
        ("fine-tuned", "clean", 0.655, []),
        ("fine-tuned", "PGD-20 Linf 8/255", 0.331, ["gradients of zero"]),
    )
]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(records: list[dict[str, Any]], stream: io.StringIO) -> str:
    console = Console(stream)
    for record in records:
        console.write(record)
    console.close()
    console.close()
    return stream.getvalue()


def test_without_a_terminal_there_is_one_plain_line_per_epoch() -> None:
    lines = shown(RECORDS, io.StringIO()).splitlines()
    assert len(lines) == 3
    assert lines[0] == "starting: 2 workers, 413,466 parameters"
    for part in ("fine-tuning", "epoch 1/2", "step 100/200", "loss 1.23", "clean 70.0 %", "robust 35.0 %",
                 "PGD-10 Linf 8/255", "density 0.001", "50.0x less", "sent 2 MB", "skipped 1"):  # fmt: skip
        assert part in lines[1]
    assert lines[2] == "note: port 9400 is taken [bold]"


def test_without_a_terminal_output_is_ascii_whatever_the_text() -> None:
    text = shown([{"event": "notice", "text": "épsilon → ∞"}], io.StringIO())
    assert text.isascii()
    assert "psilon" in text


def test_on_a_terminal_there_is_a_bar_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(RECORDS, Terminal())
    for part in ("fine-tuning", "100/200", "loss 1.23", "robust 35.0 %", "50.0x less", "sent 2 MB"):
        assert part in text
    assert "port 9400 is taken [bold]" in text
    assert "epoch 1/2" not in text


def test_a_phase_that_starts_again_after_a_restart_has_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    console = Console(Terminal())
    for record in (*RECORDS, *RECORDS):
        console.write(record)
    assert console._bars is not None
    assert len(console._bars.tasks) == 1
    console.close()


def test_records_with_missing_or_null_fields_are_shown_without_them() -> None:
    for stream in (io.StringIO(), Terminal()):
        nothing = {"loss": None, "density": None, "sent_bytes": None, "clean_accuracy": None}
        events = ("run", "phase", "step", "epoch", "notice", "evaluation", "done", "surprise")
        text = shown([{"event": event, "phase": "train", **nothing} for event in events], stream)
        assert "loss" not in text


def test_a_dense_phase_claims_no_compression() -> None:
    step = RECORDS[2] | {"density": 1.0, "dense_bytes": 2_000_000}
    assert "less" not in shown([RECORDS[1], step, RECORDS[3]], io.StringIO())


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_the_summary_compares_models_with_intervals_samples_and_bytes(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_summary([*RECORDS, *EVALUATIONS], stream, Path("runs/digits/report.html"))
    text = stream.getvalue()
    for part in ("model", "attack", "accuracy", "95 % interval", "samples", "pre-trained", "fine-tuned", "33.1 %",
                 "32.1 % - 34.1 %", "2000", "gradients of zero"):  # fmt: skip
        assert part in text
    assert "fine-tuning: sent 2 MB per worker; a dense fp32 all-reduce would have sent 100 MB (50.0 times more)" in text
    assert "report: runs/digits/report.html" in text
    assert text.isascii() or stream.isatty()


def test_the_summary_of_a_run_without_evaluations_shows_what_there_is() -> None:
    stream = io.StringIO()
    print_summary(RECORDS[:3], stream)
    assert stream.getvalue().startswith("fine-tuning: sent 2 MB per worker")


def test_bytes_and_factors_have_three_digits() -> None:
    assert [megabytes(n) for n in (12_345, 3_744_178, 180_888_000, 1_488_000_000)] == [
        "0.0123 MB",
        "3.74 MB",
        "181 MB",
        "1,488 MB",
    ]
    assert [times(x) for x in (1.04, 48.31, 126.04)] == ["1.0", "48.3", "126"]
