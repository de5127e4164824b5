"""Records as JSON lines: RUN/metrics.jsonl, which the report and the console of another process read.

One writer at a time. A record is one line and one `write` to a file opened for appending, so a killed writer
can damage only the last line. Readers ignore a last line without its newline; the next writer removes it, so
that any other damage is real and is reported with its line number.

The output is strict JSON: a float that is not finite becomes null (JSON has no NaN). What was skipped because
of it is counted in the record's `nonfinite_steps`.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distrobust.errors import CheckpointError


class JsonLines:
    """Appends each record to `path` as one line; the directory is made if it is missing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_last_line(path)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        line = memoryview((encode(record) + "\n").encode())
        while line:  # an unbuffered write may be short, for example on a full disk
            line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


def encode(record: Mapping[str, Any]) -> str:
    """One line of strict JSON. Numbers of numpy and torch become plain numbers, paths become text."""
    try:
        return json.dumps(record, allow_nan=False, default=_plain, separators=(",", ":"))
    except ValueError:  # "Out of range float values are not JSON compliant": rare, so looked for only now
        return json.dumps(_finite(record), allow_nan=False, separators=(",", ":"))


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file, in the order written. A torn last line is left out.

    Raises CheckpointError when the file is missing or any complete line is not a JSON object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the metrics of a run: {error.strerror}") from error
    records: list[dict[str, Any]] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _decode(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):
            raise CheckpointError(
                f"{path}, line {number}: expected one JSON object per line, got {line[:60]!r}; "
                "remove the line to read the rest"
            )
    return records


def latest(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What still holds after restarts: of the records of one event, phase and step only the last stays.

    Likewise one evaluation per model and attack, and one record that announces a phase. In the order written.
    """
    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for position, record in enumerate(records):
        event = record.get("event")
        key: tuple[Any, ...] = (event, position)
        if event == "evaluation":
            key = (event, record.get("model"), record.get("attack"))
        elif "phase" in record:
            key = (event, record["phase"], record.get("step"))
        kept.pop(key, None)
        kept[key] = record
    return list(kept.values())


def follow(
    path: Path, stop: Callable[[], bool], *, from_end: bool = False, poll_s: float = 0.2
) -> Iterator[dict[str, Any]]:
    """Yields the records of a file that another process is writing, as they come.

    Waits for the file to appear. Once `stop()` is true, yields what is there and ends. `from_end` leaves out
    the lines that are complete at the first look (the earlier part of a resumed run). `poll_s`: seconds
    between two looks. A damaged line is yielded as a notice, because a display should not end a run.
    """
    position = 0
    if from_end and path.exists():
        position = path.read_bytes().rfind(b"\n") + 1
    while True:
        last = stop()  # asked before reading, so that what was written before the stop is still seen
        lines, position = _complete_lines(path, position)
        for line in lines:
            record = _decode(line)
            if record is not None:
                yield record
            elif line.strip():
                text = f"{path.name}: skipped a line that is not a JSON object: {line[:60]!r}"
                yield {"event": "notice", "time": time.time(), "text": text}
        if last:
            return
        time.sleep(poll_s)


def _complete_lines(path: Path, position: int) -> tuple[list[bytes], int]:
    """Lines that end at or after byte `position` of the file, and the position after the last of them."""
    try:
        with path.open("rb") as file:
            if position > os.fstat(file.fileno()).st_size:
                position = 0  # the file was replaced by a new one
            file.seek(position)
            data = file.read()
    except FileNotFoundError:
        return [], 0
    end = data.rfind(b"\n") + 1
    return data[:end].split(b"\n")[:-1], position + end


def _end_last_line(path: Path) -> None:
    """Removes a torn last line; completes one that lacks only its newline."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        start = data.rfind(b"\n") + 1
        if start == len(data):
            return
        if _decode(data[start:]) is None:
            file.truncate(start)
        else:
            file.write(b"\n")


def _decode(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line, or None if it is anything else."""
    try:
        record = json.loads(line)
    except ValueError:  # includes a UnicodeDecodeError
        return None
    return record if isinstance(record, dict) else None


def _plain(value: object) -> Any:
    """Numpy and torch scalars as Python numbers; anything else that JSON lacks as text."""
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)


def _finite(value: Any) -> Any:
    """The same value with null for every float that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return _finite(_plain(value))
