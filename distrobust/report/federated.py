"""The page of a simulation: what came out, for whom, and what it cost in bytes and simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distrobust.metrics.console import percent
from distrobust.report import page
from distrobust.report.federated_plots import Course, figures
from distrobust.report.story import Record

MODELS = {"global": "global model", "ftfa": "fine-tuned (FTFA)", "rtfa": "regularised (RTFA)"}


def parts(name: str, records: Sequence[Record]) -> list[str]:
    """The sections of the page. ConfigError without matplotlib."""
    begun = [r for r in records if r["event"] == "simulation"][-1]
    rounds = sorted((r for r in records if r["event"] == "round"), key=lambda r: int(r["round"]))
    looks = sorted((r for r in records if r["event"] == "held_out"), key=lambda r: int(r["round"]))
    summaries = [r for r in records if r["event"] == "summary"]
    course = Course(begun, rounds, looks, summaries[-1] if summaries else None)
    facts = [
        f"{begun['num_clients']:,} clients",
        f"{begun['config']['clients']['per_round']} a round",
        str(begun["config"]["clients"]["partition"]),
        f"{begun['config']['model']} of {begun['num_parameters']:,} parameters",
    ]
    started = float(records[0].get("time") or 0)
    return [
        page.header("simulation", course.summary is not None, name, _verdict(course), facts, started),
        page.tiles(_tiles(course)),
        _scores(course),
        page.notices(_notices(course)),
        page.plots(figures(course), "Bytes are lengths of messages; times are those of the virtual clock."),
        page.settings(begun),
    ]


def _verdict(course: Course) -> str:
    """The main result in a sentence."""
    if not course.rounds:
        return "No round has ended yet."
    where = f"After {len(course.rounds):,} rounds and {_clock(course)} on the virtual clock "
    if course.summary is not None:
        test = course.summary["test"]
        robust = (
            f" and {percent(test['robust']['accuracy'])} under {test['robust']['attack']}" if "robust" in test else ""
        )
        low = course.summary["client_quantiles"][0]
        return (
            f"{where}the global model has {percent(test['clean']['accuracy'])} accuracy on the test rows{robust}; one "
            f"client in twenty has less than {percent(low)} on rows of its own mix of classes."
        )
    if course.looks:
        return f"{where}the global model has {percent(course.looks[-1]['clean'])} accuracy on held-out rows."
    return f"{where}nobody has looked at the held-out rows yet."


def _tiles(course: Course) -> list[tuple[str, str]]:
    if not course.rounds:
        return []
    found = []
    if course.summary is not None:
        found += [(percent(one["accuracy"]), f"{one['attack']}, test rows") for one in course.summary["test"].values()]
    down, up, wasted = (
        sum(int(r[name]) for r in course.rounds for name in names)
        for names in (("download_bytes",), ("upload_bytes",), ("wasted_download_bytes", "wasted_upload_bytes"))
    )
    found += [
        (_megabytes(down), "downloaded, all clients together"),
        (_megabytes(up), "uploaded, all clients together"),
        (percent(wasted / max(1, down + up)), "of all bytes wasted: their updates did not count"),
        (_clock(course), "on the virtual clock"),
    ]
    return found


def _scores(course: Course) -> str:
    """The test rows' table, and the sentence on personal models."""
    if course.summary is None:
        return ""
    rows = [{"model": "global", **one} for one in course.summary["test"].values()]
    notes = []
    personal: dict[str, Any] | None = course.summary["personal"]
    if personal is not None:
        each = ", ".join(f"{MODELS[name]} {percent(value)}" for name, value in personal["accuracies"].items())
        notes.append(f"On {personal['rows']:,} own test rows of {personal['clients']:,} clients: {each}.")
    return page.accuracies("On the test rows", rows, notes)


def _notices(course: Course) -> list[str]:
    if not course.rounds:
        return []
    texts = {
        "late": "arrived after the deadline",
        "surplus": "were not needed, because enough others had arrived",
        "lost": "were lost in the middle of their upload",
        "nonfinite": "were not finite and have been excluded",
    }
    counts = {name: sum(int(r[name]) for r in course.rounds) for name in texts}
    started = sum(int(r["started"]) for r in course.rounds)
    found = [f"{n:,} of {started:,} updates {texts[name]}." for name, n in counts.items() if n]
    empty = sum(r["updates"] == 0 for r in course.rounds)
    return [*found, *([f"{empty:,} rounds had no update at all."] if empty else [])]


def _clock(course: Course) -> str:
    return page.duration(float(course.rounds[-1]["clock_s"]))


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"
