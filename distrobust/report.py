"""A run directory -> one self-contained HTML page: what was run, what came out, and how it went.

The page is made from RUN/metrics.jsonl alone, so it can be written while the run is going, after it stopped
half-way, or on another machine. It loads nothing from anywhere; all text from the run is escaped.
"""

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from distrobust.errors import CheckpointError
from distrobust.metrics.console import megabytes, percent, times, traffic
from distrobust.metrics.jsonl import read
from distrobust.report_heatmap import heat_maps
from distrobust.report_plots import Figure, figures
from distrobust.report_story import Record, Story, tell


def write_report(run_directory: Path) -> Path:
    """Writes RUN/report.html, whole or not at all, and returns its path.

    Raises CheckpointError when there is nothing to report on, ConfigError without matplotlib.
    """
    metrics = run_directory / "metrics.jsonl"
    if not metrics.is_file():
        raise CheckpointError(
            f"{run_directory}: no metrics.jsonl here; expected the directory of a run of `distrobust train`"
        )
    records = read(metrics)
    if not records:
        raise CheckpointError(f"{metrics}: no records yet; try again after the first steps")
    story = tell(run_directory.resolve().name, records)
    restarts = [step for step, _ in story.restarts]
    plots = [*figures(story.phases, restarts), *heat_maps(story.phases, restarts)] if story.phases else []
    page = _page(story, plots)
    path = run_directory / "report.html"
    temporary = path.with_name(f".report.html.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _page(story: Story, plots: Sequence[Figure]) -> str:
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    parts = [
        _header(story),
        _tiles(story),
        _evaluations(story),
        _notices(story),
        _plots(story, plots),
        _settings(story),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(story.name)} - distrobust</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part).replace(" %", "\u00a0%")  # no line break inside a number
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(story: Story) -> str:
    started = datetime.fromtimestamp(story.started, UTC).strftime("%Y-%m-%d %H:%M UTC")
    state = "finished" if story.seconds is not None else "not finished"
    what = []
    if story.run.get("num_parameters"):
        what.append(f"{story.run['num_parameters']:,} parameters")
    if story.run.get("world_size"):
        what.append(f"{story.run['world_size']} worker" + ("s" if story.run["world_size"] != 1 else ""))
    what += [f"{phase.num_steps:,} steps of {phase.title}" for phase in story.phases]
    return (
        f'<header><p class="eyebrow">distrobust run <span class="state">{state}</span></p>'
        f"<h1>{escape(story.name)}</h1>"
        f'<p class="lede">{escape(_verdict(story))}</p>'
        f'<p class="facts">{escape(" · ".join([*what, f"started {started}"]))}</p></header>'
    )


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
        tiles.append((_duration(story.seconds), "wall time"))
    cells = (f"<div><strong>{escape(value)}</strong><span>{escape(name)}</span></div>" for value, name in tiles)
    return f'<section class="tiles" aria-label="Main results">{"".join(cells)}</section>' if tiles else ""


def _evaluations(story: Story) -> str:
    """The before / after table; the interval is also drawn."""
    if not story.evaluations:
        return ""
    rows = []
    for row in story.evaluations:
        low, high, value = (float(row.get(name) or 0) for name in ("low", "high", "accuracy"))
        bar = (
            f'<span class="bar" role="img" aria-label="{percent(low)} to {percent(high)}">'
            f'<i style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
            f'<b style="left:{100 * value:.2f}%"></b></span>'
        )
        flags = "; ".join(str(flag) for flag in row.get("flags") or ()) or "none"
        texts = [
            f"{percent(low)} to {percent(high)}",
            f"{row.get('samples', '-')}",
            f"{row.get('seed', '-')}",
            flags,
        ]
        rows.append(
            f"<tr><th scope=row>{escape(str(row.get('model')))}</th><td>{escape(str(row.get('attack')))}</td>"
            f"<td class=n><strong>{percent(row.get('accuracy'))}</strong></td><td>{bar}</td>"
            + "".join(f"<td class={kind}>{escape(text)}</td>" for kind, text in zip("nnnt", texts, strict=True))
            + "</tr>"
        )
    names = ["model", "attack", "accuracy", "0 to 100 %", "95 % interval", "samples", "seed", "flags"]
    head = "".join(f"<th scope=col>{name}</th>" for name in names)
    sent = "".join(f"<p>{escape(line)}.</p>" for line in traffic([step for p in story.phases for step in p.steps]))
    return (
        "<section><h2>Before and after</h2><div class=scroll><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<div class=note>{sent}<p>Intervals are 95 % Wilson intervals over the held-out samples. "
        "A flag is a reason to distrust an accuracy under attack.</p></div></section>"
    )


def _notices(story: Story) -> str:
    skipped = sum(int(phase.steps[-1].get("nonfinite_steps") or 0) for phase in story.phases if phase.steps)
    texts = list(story.notices)
    if skipped:
        texts.append(f"steps skipped on all ranks because a gradient was not finite: {skipped:,}")
    texts += [f"restarted: {text}" for _, text in story.restarts]
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<section class=notices><h2>Worth knowing</h2><ul>{items}</ul></section>" if items else ""


def _plots(story: Story, plots: Sequence[Figure]) -> str:
    if not plots:
        return ""
    drawn = []
    for plot in plots:
        legend = "".join(
            f'<span><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in plot.legend
        )
        drawn.append(
            f"<figure><figcaption><h3>{escape(plot.title)}</h3>"
            f"<p>{escape(plot.caption)}</p><p class=legend>{legend}</p></figcaption>"
            f'<svg viewBox="{plot.view}" role="img" aria-label="{escape(plot.alt)}">'
            f"<title>{escape(plot.alt)}</title>{plot.svg}</svg></figure>"
        )
    dotted = " Dotted lines mark restarts." if story.restarts else ""
    return (
        f"<section><h2>How it went</h2><p class=note>Steps of all phases, one after the other.{dotted}</p>"
        f"<div class=plots>{''.join(drawn)}</div></section>"
    )


def _settings(story: Story) -> str:
    """The resolved configuration by dotted path, as `--set` takes it, and the versions."""
    sections = []
    for title, key in (("Resolved configuration", "config"), ("Versions", "versions")):
        values = story.run.get(key)
        if values:
            rows = "".join(f"<div><dt>{escape(path)}</dt><dd>{escape(text)}</dd></div>" for path, text in _flat(values))
            sections.append(f"<details><summary>{title}</summary><dl>{rows}</dl></details>")
    return f"<section>{''.join(sections)}</section>" if sections else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted path, value as text) of every leaf of a nested configuration."""
    leaves: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves += _flat(value, f"{prefix}{key}.")
        else:
            text = f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)
            leaves.append((f"{prefix}{key}", text))
    return leaves


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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
