"""RUN/metrics.jsonl: what is written is read, whatever happened to the writer."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrobust.errors import CheckpointError
from distrobust.metrics import jsonl
from distrobust.metrics.jsonl import JsonLines, encode, follow, latest, read

number = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | number | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def write(path: Path, *records: dict[str, Any]) -> None:
    lines = JsonLines(path)
    for record in records:
        lines.write(record)
    lines.close()


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), plain, max_size=5))
def test_a_record_is_one_line_and_comes_back_unchanged(record: dict[str, Any]) -> None:
    line = encode(record)
    assert "\n" not in line
    assert json.loads(line) == record


def test_floats_that_are_not_finite_become_null_in_strict_json() -> None:
    record = {"loss": math.nan, "groups": {"a": math.inf, "b": [1.0, -math.inf]}, "step": 3, "text": "NaN"}
    strict = json.loads(encode(record), parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))
    assert strict == {"loss": None, "groups": {"a": None, "b": [1.0, None]}, "step": 3, "text": "NaN"}


def test_scalars_of_numpy_and_paths_are_written_as_plain_values() -> None:
    record = {"a": np.float32(0.5), "b": np.int64(3), "c": Path("runs/x"), "d": np.float32(math.nan)}
    assert json.loads(encode(record)) == {"a": 0.5, "b": 3, "c": "runs/x", "d": None}


def test_every_record_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "new" / "metrics.jsonl")
    lines.write({"event": "done"})
    assert read(tmp_path / "new" / "metrics.jsonl") == [{"event": "done"}]
    lines.close()


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 1}, {"step": 2})
    whole = path.read_bytes()
    for length in range(len(b'{"step":1}\n'), len(whole) - 2):
        path.write_bytes(whole[:length])
        assert read(path) == [{"step": 1}]


def test_a_new_writer_starts_on_a_fresh_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for tail, kept in ((b'{"step":2, "lo', []), (b'{"step":2}', [{"step": 2}]), (b"", []), (b"\xff\x00", [])):
        path.write_bytes(b'{"step":1}\n' + tail)
        write(path, {"step": 3})
        assert read(path) == [{"step": 1}, *kept, {"step": 3}]


def test_other_damage_is_an_error_with_the_line_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for damage in (b'{"step":', b"[1, 2]", b"\x00\x00", b"\xff"):
        path.write_bytes(b'{"step":1}\n' + damage + b'\n{"step":3}\n')
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2: expected one JSON object per line"):
            read(path)


def test_a_missing_file_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^[^\n]*cannot read the metrics[^\n]*$"):
        read(tmp_path / "metrics.jsonl")


def test_the_last_record_of_a_phase_and_step_holds() -> None:
    old, new, other = ({"event": "step", "phase": p, "step": 10, "n": n} for p, n in (("a", 1), ("a", 2), ("b", 3)))
    evaluations = [{"event": "evaluation", "model": "m", "attack": "clean", "accuracy": a} for a in (0.1, 0.2)]
    notices = [{"event": "notice", "text": "x"}, {"event": "notice", "text": "x"}]
    assert latest([old, other, new, *evaluations, *notices]) == [other, new, evaluations[1], *notices]


def test_follow_yields_what_another_writer_appends_and_ends_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    stop = threading.Event()
    scenes = [
        lambda: write(path, {"step": 1}, {"step": 2}),
        lambda: path.write_bytes(path.read_bytes() + b'{"step":'),  # half a line: nothing to see yet
        lambda: path.write_bytes(path.read_bytes() + b"3}\nnot json\n"),
        lambda: (write(path, {"step": 4}), stop.set()),
    ]
    monkeypatch.setattr(jsonl.time, "sleep", lambda seconds: scenes.pop(0)())
    seen = list(follow(path, stop.is_set))
    assert [record.get("step") for record in seen] == [1, 2, 3, None, 4]
    assert "not json" in seen[3]["text"]
    assert not scenes


def test_follow_from_the_end_leaves_out_the_earlier_part_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2, "torn')
    scenes = [lambda: write(path, {"step": 3})]
    monkeypatch.setattr(jsonl.time, "sleep", lambda seconds: scenes.pop(0)())
    assert [record["step"] for record in follow(path, lambda: not scenes, from_end=True)] == [3]
