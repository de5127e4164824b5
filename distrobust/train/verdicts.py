"""Verdicts kept in a directory, so that an evaluation that was interrupted continues, and ranks share one.

    settings.json         what determines which images and random numbers: model, data, batches, seed
    verdicts-0000.jsonl   one line per finished (trial, batch), of one rank; any number of ranks, also of
                          earlier starts with more or fewer
    evaluation.json       the record, once complete

A line is written when its batch is done, in one write to a file opened for appending: whatever kills a rank
costs it the batch it was at. A torn last line is ignored, and removed by the next writer; so is a line that is
JSON but no verdict. A trial's key names all its settings (trial.py), so attacks can be added later and settings
never mix. The directory must be on storage that all ranks share.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distrobust.errors import CheckpointError
from distrobust.evaluation.trial import Verdict
from distrobust.metrics import jsonl
from distrobust.train.rundir import own_name, write_atomically

Write = Callable[[str, int, Verdict], None]


class VerdictDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "evaluation.json"
        self._settings = path / "settings.json"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Creates it, or makes sure that it belongs to the same settings; CheckpointError if not. All ranks may
        call it at once."""
        self.path.mkdir(parents=True, exist_ok=True)
        mine = own_name(self._settings)
        mine.write_text(json.dumps(settings, indent=1) + "\n")
        try:
            os.link(mine, self._settings)  # fails if it exists: the first rank's stays
        except FileExistsError:
            self._compare(settings)
        finally:
            mine.unlink()

    def _compare(self, settings: Mapping[str, Any]) -> None:
        try:
            theirs = json.loads(self._settings.read_text())
        except ValueError as error:
            raise CheckpointError(f"{self._settings}: not JSON ({error}); delete {self.path}") from None
        for name in settings:
            found = theirs.get(name) if isinstance(theirs, dict) else None
            if found != settings[name]:
                raise CheckpointError(
                    f"{self.path} belongs to another evaluation ({name}: it has {_short(found)}, this one "
                    f"{_short(settings[name])}); give another directory with --out, or delete that one"
                )

    def read(self) -> dict[tuple[str, int], Verdict]:
        """(trial's key, batch) -> verdict, of all ranks and starts. CheckpointError for a damaged file."""
        found: dict[tuple[str, int], Verdict] = {}
        for path in sorted(self.path.glob("verdicts-*.jsonl")):
            for line in jsonl.read(path):
                key, batch, verdict = line.get("trial"), line.get("batch"), _parse(line.get("verdict"))
                if isinstance(key, str) and isinstance(batch, int) and verdict is not None:
                    found.setdefault((key, batch), verdict)
        return found

    @contextmanager
    def writer(self, rank: int) -> Iterator[Write]:
        """write(trial's key, batch, verdict) while the block runs; CheckpointError if another start is at it."""
        path = self.path / f"verdicts-{rank:04}.jsonl"
        with path.open("ab") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.path} is in use by another evaluation; wait for it, or give another directory with --out"
                ) from None
            lines = jsonl.JsonLines(path)
            try:
                yield lambda key, batch, verdict: lines.write(
                    {"trial": key, "batch": batch, "verdict": asdict(verdict)}
                )
            finally:
                lines.close()

    def write_record(self, record: Mapping[str, Any]) -> None:
        write_atomically(self.record, json.dumps(record, indent=1) + "\n")


def _parse(value: object) -> Verdict | None:
    """None for anything that `asdict(verdict)` cannot have been."""
    if not isinstance(value, dict):
        return None
    try:
        verdict = Verdict(**value)
        numbers = [verdict.seconds, verdict.forward, verdict.backward, *verdict.counts.values()]
    except (TypeError, AttributeError):
        return None
    ok = isinstance(verdict.right, str) and set(verdict.right) <= set("01-")
    return verdict if ok and all(isinstance(number, (int, float)) for number in numbers) else None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:16]}..."
