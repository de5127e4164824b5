"""A run directory -> one self-contained HTML page: what was run, what came out, and how it went.

The page is made from RUN/metrics.jsonl alone, so it can be written while the run is going, after it stopped
half-way, or on another machine.
"""

from collections.abc import Sequence
from pathlib import Path

from distrobust.errors import CheckpointError
from distrobust.metrics.console import megabytes, percent, times, traffic
from distrobust.metrics.jsonl import read
from distrobust.report import federated, page
from distrobust.report.heatmap import heat_maps
from distrobust.report.page import duration
from distrobust.report.plots import Figure, figures
from distrobust.report.story import Record, Story, tell


def write_report(run_directory: Path) -> Path:
    """Writes RUN/report.html, whole or not at all, and returns its path.

    Raises CheckpointError when there is nothing to report on, ConfigError without matplotlib.
    """
    metrics = run_directory / "metrics.jsonl"
    if not metrics.is_file():
        raise CheckpointError(
            f"{run_directory}: no metrics.jsonl here; expected the directory of a run of `distrobust train` or "
            "`distrobust simulate`"
        )
    records = read(metrics)
    if not records:
        raise CheckpointError(f"{metrics}: no records yet; try again after the first steps")
    name, path = run_directory.resolve().name, run_directory / "report.html"
    if any(record.get("event") == "simulation" for record in records):
        return page.write(path, name, federated.parts(name, records))
    story = tell(name, records)
    restarts = [step for step, _ in story.restarts]
    plots = [*figures(story.phases, restarts), *heat_maps(story.phases, restarts)] if story.phases else []
    return page.write(path, name, _parts(story, plots))


def _parts(story: Story, plots: Sequence[Figure]) -> list[str]:
    dotted = " Dotted lines mark restarts." if story.restarts else ""
    return [
        _header(story),
        _tiles(story),
        _evaluations(story),
        _notices(story),
        page.plots(plots, f"Steps of all phases, one after the other.{dotted}"),
        page.settings(story.run),
    ]


def _header(story: Story) -> str:
    what = []
    if story.run.get("num_parameters"):
        what.append(f"{story.run['num_parameters']:,} parameters")
    if story.run.get("world_size"):
        what.append(f"{story.run['world_size']} worker" + ("s" if story.run["world_size"] != 1 else ""))
    what += [f"{phase.num_steps:,} steps of {phase.title}" for phase in story.phases]
    finished = story.seconds is not None
    return page.header("run", finished, story.name, _verdict(story), what, story.started)


def _verdict(story: Story) -> str:
    """The main result in a sentence, as far as it is known."""
    attack = _main_attack(story)
    sentence = ""
    if attack is not None:
        robust, clean = _before_after(story, attack), _before_after(story, "clean")
        if len(robust) == 2:
            verb = "raised" if robust[1] > robust[0] else "did not raise"
            before, after = percent(robust[0]), percent(robust[1])
            sentence = f"Fine-tuning {verb} accuracy under {attack}: from {before} to {after}"
        else:
            sentence = f"Accuracy under {attack} is {percent(robust[0])}"
        if len(clean) == 2:
            sentence += f"; clean accuracy went from {percent(clean[0])} to {percent(clean[1])}"
        sentence += "."
    else:
        sentence = "No model of this run has been evaluated yet."
    factor = _factor(story)
    if factor is not None:
        sentence += (
            f" In {story.phases[-1].title} each worker sent {times(factor)} times fewer bytes "
            "than a dense all-reduce would have."
        )
    return sentence


def _tiles(story: Story) -> str:
    """The main numbers, large."""
    tiles = []
    attack = _main_attack(story)
    for title, name in ((f"under {attack}", attack), ("clean", "clean")):
        values = _before_after(story, name) if name else []
        if values:
            tiles.append((" → ".join(percent(value) for value in values), f"accuracy, {title}"))
    epochs = [epoch for phase in story.phases for epoch in phase.epochs]
    for name in ("robust", "clean"):
        value = epochs[-1].get(f"{name}_accuracy") if epochs and not story.evaluations else None
        if value is not None:
            tiles.append((percent(value), f"{name} accuracy, newest epoch"))
    factor, last = _factor(story), _last_step(story)
    if factor is not None:
        sent, dense = megabytes(last["sent_bytes"]), megabytes(last["dense_bytes"])
        tiles.append((f"{times(factor)} times fewer", f"bytes: {sent} per worker, dense {dense}"))
    if story.seconds is not None:
        tiles.append((duration(story.seconds), "wall time"))
    return page.tiles(tiles)


def _evaluations(story: Story) -> str:
    """The before / after table."""
    sent = [f"{line}." for line in traffic([step for p in story.phases for step in p.steps])]
    return page.accuracies("Before and after", story.evaluations, sent)


def _notices(story: Story) -> str:
    skipped = sum(int(phase.steps[-1].get("nonfinite_steps") or 0) for phase in story.phases if phase.steps)
    texts = list(story.notices)
    if skipped:
        texts.append(f"steps skipped on all ranks because a gradient was not finite: {skipped:,}")
    texts += [f"restarted: {text}" for _, text in story.restarts]
    return page.notices(texts)


def _main_attack(story: Story) -> str | None:
    """The attack the headline speaks of: the last one evaluated."""
    attacks = [str(row.get("attack")) for row in story.evaluations if row.get("attack") != "clean"]
    return attacks[-1] if attacks else None


def _before_after(story: Story, attack: str) -> list[float]:
    """The accuracy of the first and of the last model evaluated under `attack`, or of the only one."""
    rows = [row for row in story.evaluations if row.get("attack") == attack and row.get("accuracy") is not None]
    return [float(row["accuracy"]) for row in (rows[:1] + rows[-1:] if len(rows) > 1 else rows)]


def _last_step(story: Story) -> Record:
    steps = [step for phase in story.phases for step in phase.steps]
    return steps[-1] if steps else {}


def _factor(story: Story) -> float | None:
    """Dense bytes over sent bytes in the last phase, as counted; None when nothing was sent."""
    last = _last_step(story)
    sent, dense = last.get("sent_bytes"), last.get("dense_bytes")
    return float(dense) / float(sent) if sent and dense else None
