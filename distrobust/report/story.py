"""The records of a run, sorted into what the report tells: phases, results, restarts, notices."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distrobust.metrics.console import PHASES
from distrobust.metrics.jsonl import latest

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Phase:
    """Records of one phase, ascending in step. `offset`: steps of the phases before it."""

    name: str
    title: str
    offset: int
    num_steps: int
    steps: list[Record] = field(default_factory=list)
    epochs: list[Record] = field(default_factory=list)
    watches: list[Record] = field(default_factory=list)


@dataclass(frozen=True)
class Story:
    """What the records of a run say, in the order the page tells it.

    `restarts`: (steps of all phases before it, sentence) for each restart. `seconds`: of all starts together;
    None while not done.
    """

    name: str
    run: Record
    phases: list[Phase]
    evaluations: list[Record]
    restarts: list[tuple[int, str]]
    notices: list[str]
    started: float
    seconds: float | None


def tell(name: str, records: Sequence[Record]) -> Story:
    """Sorts the records of the run called `name` into a story."""
    kept = latest(records)
    phases = _phases(kept)
    runs = [record for record in records if record.get("event") == "run"]
    done = [record for record in kept if record.get("event") == "done"]
    notices = [str(record.get("text")) for record in kept if record.get("event") == "notice"]
    return Story(
        name=name,
        run=runs[-1] if runs else {},
        phases=phases,
        evaluations=[record for record in kept if record.get("event") == "evaluation"],
        restarts=_restarts(records, {phase.name: phase for phase in phases}),
        notices=list(dict.fromkeys(notices)),
        started=float(records[0].get("time") or 0),
        seconds=_seconds(records) if done else None,
    )


def _seconds(records: Sequence[Record]) -> float:
    """Each start from its first record to its last, or as long as it says; not the time between two of them."""
    starts = [place for place, record in enumerate(records) if record.get("event") == "run"] or [0]
    total = 0.0
    for begin, end in itertools.pairwise([*starts, len(records)]):
        said = [record["seconds"] for record in records[begin:end] if record.get("event") == "done"]
        times = [record["time"] for record in records[begin:end] if record.get("time")]
        total += float(said[-1]) if said else max(0.0, times[-1] - times[0]) if times else 0.0
    return total


def _phases(kept: Sequence[Record]) -> list[Phase]:
    """One Phase per phase that has a record, in the order of the run."""
    names = dict.fromkeys(str(record["phase"]) for record in kept if "phase" in record)
    phases: list[Phase] = []
    offset = 0
    for name in sorted(names, key=lambda name: list(PHASES).index(name) if name in PHASES else len(PHASES)):
        own = [record for record in kept if record.get("phase") == name]
        steps, epochs, watches = (
            sorted((r for r in own if r.get("event") == event), key=lambda r: int(r["step"]))
            for event in ("step", "epoch", "watch")
        )
        planned = [int(r.get("num_steps") or 0) for r in own if r.get("event") == "phase"]
        num_steps = max([*planned, *(int(r["step"]) for r in (*steps[-1:], *epochs[-1:]))], default=0)
        phases.append(Phase(name, PHASES.get(name, name), offset, num_steps, steps, epochs, watches))
        offset += num_steps
    return phases


def _restarts(records: Sequence[Record], phases: Mapping[str, Phase]) -> list[tuple[int, str]]:
    """Where each start but the first resumed: `resumed_step` of `resumed_phase`, or of the phase named next."""
    restarts: list[tuple[int, str]] = []
    starts = [place for place, record in enumerate(records) if record.get("event") == "run"]
    for place in starts[1:]:
        named = [record.get("phase") for record in records[place:] if "phase" in record]
        phase = phases.get(str(records[place].get("resumed_phase") or (named or [None])[0]))
        step = int(records[place].get("resumed_step") or 0)
        if phase is not None:
            restarts.append((phase.offset + step, f"resumed after step {step:,} of {phase.title}"))
    return restarts
