"""The parts that report pages are made of: the shell, tiles, a table of accuracies, plots, the configuration.

Pages load nothing from anywhere; all text from a run is escaped.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from distrobust.metrics.console import percent
from distrobust.report.plots import Figure
from distrobust.report.story import Record


def write(path: Path, title: str, parts: Iterable[str]) -> Path:
    """Writes a page with these sections, empty ones left out; whole or not at all."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} - distrobust</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part).replace(" %", "\u00a0%")  # no line break inside a number
        + "\n</main>\n</body>\n</html>\n"
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def header(kind: str, finished: bool, title: str, verdict: str, facts: Sequence[str], started: float) -> str:
    """kind: run or simulation. started: unix seconds."""
    state = "finished" if finished else "not finished"
    begun = datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<header><p class="eyebrow">distrobust {kind} <span class="state">{state}</span></p>'
        f"<h1>{escape(title)}</h1>"
        f'<p class="lede">{escape(verdict)}</p>'
        f'<p class="facts">{escape(" · ".join([*facts, f"started {begun}"]))}</p></header>'
    )


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """The main numbers, large: (number, what it is)."""
    cells = [f"<div><strong>{escape(value)}</strong><span>{escape(name)}</span></div>" for value, name in values]
    return f'<section class="tiles" aria-label="Main results">{"".join(cells)}</section>' if cells else ""


def accuracies(title: str, evaluations: Sequence[Record], notes: Sequence[str]) -> str:
    """A table of models under attacks, intervals also drawn, and sentences below it."""
    if not evaluations:
        return ""
    rows = []
    for row in evaluations:
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
    below = "".join(f"<p>{escape(line)}</p>" for line in notes)
    return (
        f"<section><h2>{escape(title)}</h2><div class=scroll><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<div class=note>{below}<p>Intervals are 95 % Wilson intervals over the samples. "
        "A flag is a reason to distrust an accuracy under attack.</p></div></section>"
    )


def notices(texts: Sequence[str]) -> str:
    """What is worth knowing, if anything is."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<section class=notices><h2>Worth knowing</h2><ul>{items}</ul></section>" if items else ""


def plots(figures: Sequence[Figure], note: str) -> str:
    """All figures, with their legends."""
    if not figures:
        return ""
    drawn = []
    for plot in figures:
        legend = "".join(
            f'<span><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in plot.legend
        )
        drawn.append(
            f"<figure><figcaption><h3>{escape(plot.title)}</h3>"
            f"<p>{escape(plot.caption)}</p><p class=legend>{legend}</p></figcaption>"
            f'<svg viewBox="{plot.view}" role="img" aria-label="{escape(plot.alt)}">'
            f"<title>{escape(plot.alt)}</title>{plot.svg}</svg></figure>"
        )
    return (
        f"<section><h2>How it went</h2><p class=note>{escape(note)}</p>"
        f"<div class=plots>{''.join(drawn)}</div></section>"
    )


def settings(run: Record) -> str:
    """The resolved configuration by dotted path, as `--set` takes it, and the versions."""
    sections = []
    for title, key in (("Resolved configuration", "config"), ("Versions", "versions")):
        values = run.get(key)
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


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
