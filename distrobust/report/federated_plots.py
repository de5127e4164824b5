"""The drawings of a simulation's page. Long simulations are drawn in up to 60 stretches of rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from distrobust.report.heatmap import Stretch, heat_map
from distrobust.report.plots import (
    CLEAN,
    GREY,
    LOSS,
    PAGE_COLOURS,
    ROBUST,
    SCALE,
    SENT,
    SERIES,
    Figure,
    drawing,
    style,
)
from distrobust.report.story import Phase, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_STRETCHES = 60
_WIDTHS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.025, 0.05, 0.1, 0.125)  # of a colour's range
UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
TIMES = {"compute": CLEAN, "download": SENT, "upload": ROBUST, "wait": GREY}


@dataclass(frozen=True)
class Course:
    """The records of a simulation: how it began, its rounds, its looks at the held-out rows, its end."""

    begun: Record
    rounds: Sequence[Record]
    looks: Sequence[Record]
    summary: Record | None


def figures(course: Course) -> list[Figure]:
    """Those for which there are records."""
    with style():
        found: list[Figure] = []
        if course.looks:
            found += [_accuracy(course, *axis) for axis in _axes(course)]
            found.append(_clients(course))
        if course.summary is not None:
            found.append(_histogram(course.summary))
        if course.rounds:
            found += [_bytes(course), _time(course), _fates(course), _took_part(course)]
    return found


def _axes(course: Course) -> list[tuple[str, str, Callable[[Record], float]]]:
    """What accuracy is drawn against: title, label, value at a look."""
    unit, seconds = next(one for one in UNITS if course.looks[-1]["clock_s"] >= 2 * one[1] or one is UNITS[-1])
    sent = list(accumulate(int(r["download_bytes"]) + int(r["upload_bytes"]) for r in course.rounds))
    megabytes = {int(r["round"]): total / 1e6 for r, total in zip(course.rounds, sent, strict=True)}
    return [
        ("Accuracy against rounds", "round", lambda look: int(look["round"]) + 1),
        ("Accuracy against bytes", "MB, both directions", lambda look: megabytes[int(look["round"])]),
        ("Accuracy against time", f"simulated {unit}", lambda look: float(look["clock_s"]) / seconds),
    ]


def _accuracy(course: Course, title: str, label: str, place: Callable[[Record], float]) -> Figure:
    axes = _canvas(label, " %")
    xs = [place(look) for look in course.looks]
    shown = [name for name in ("clean", "robust") if name in course.looks[-1]]
    colours = {"clean": CLEAN, "robust": ROBUST}
    for name in shown:
        ys = [100 * float(look[name]) for look in course.looks]
        axes.plot(xs, ys, color=SERIES[colours[name]], marker="o", markersize=3)
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    caption = "Of the global model, on held-out rows."
    words = ", ".join(f"{name} {100 * float(course.looks[-1][name]):.3g} % at {xs[-1]:.3g} {label}" for name in shown)
    return _figure(axes, title, caption, [(name, colours[name]) for name in shown], words)


def _clients(course: Course) -> Figure:
    """Quantiles over clients as bands."""
    axes = _canvas("round", " %")
    xs = [int(look["round"]) + 1 for look in course.looks]
    bands = [[100 * float(q) for q in look["client_quantiles"]] for look in course.looks]
    low, quarter, middle, three_quarters, high = zip(*bands, strict=True)
    colour = SERIES[CLEAN]
    axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.fill_between(xs, quarter, three_quarters, color=colour, alpha=0.35, linewidth=0)
    axes.plot(xs, middle, color=colour)
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    caption = (
        "Line: the client in the middle; bands: half of the clients, and nine in ten. A client's accuracy is that on "
        "held-out rows of its own mix of classes."
    )
    words = f"5 % of clients below {low[-1]:.3g} %, half below {middle[-1]:.3g} %, 95 % below {high[-1]:.3g} %"
    return _figure(axes, "Accuracy over clients", caption, [], words)


def _histogram(summary: Record) -> Figure:
    """At the end: of the global model by class mix, or of personal models on clients' own rows."""
    axes = _canvas("accuracy of a client, %", "")
    personal = summary["personal"]
    histograms = personal["histograms"] if personal is not None else {"global": summary["client_histogram"]}
    colours = {"global": GREY, "ftfa": CLEAN, "rtfa": ROBUST}
    for name, counts in histograms.items():
        edges = [100 * i / len(counts) for i in range(len(counts) + 1)]
        axes.stairs(
            counts, edges, color=SERIES[colours[name]], fill=name == "global", alpha=0.5 if name == "global" else 1
        )
    axes.set_xlim(0, 100)
    on = "their own test rows" if personal is not None else "test rows of their own mix of classes"
    words = "; ".join(f"{name}: {sum(c)} clients" for name, c in histograms.items())
    legend = [(name.upper() if name != "global" else name, colours[name]) for name in histograms]
    return _figure(axes, "Clients by accuracy at the end", f"Number of clients, by accuracy on {on}.", legend, words)


def _bytes(course: Course) -> Figure:
    axes = _canvas("round", " MB")
    xs = [int(r["round"]) + 1 for r in course.rounds]
    ends = []
    for name, colour, line in (
        ("download", SENT, "-"),
        ("upload", ROBUST, "-"),
        ("wasted_download", SENT, (0, (1, 1.5))),
        ("wasted_upload", ROBUST, (0, (1, 1.5))),
    ):
        ys = [total / 1e6 for total in accumulate(int(r[f"{name}_bytes"]) for r in course.rounds)]
        axes.plot(xs, ys, color=SERIES[colour], linestyle=line)
        ends.append(f"{name.replace('_', ' ')} {ys[-1]:.3g} MB")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    caption = "Since the beginning, all clients together. Dotted: of clients whose update did not count."
    return _figure(axes, "Bytes", caption, [("down", SENT), ("up", ROBUST)], ", ".join(ends))


def _time(course: Course) -> Figure:
    """Shares of the clients' time, stretch by stretch."""
    axes = _canvas("round", " %")
    columns = _stretches(course)
    heights = {name: [sum(float(r[f"{name}_s"]) for r in own) for own in columns] for name in TIMES}
    whole = [sum(values) or 1.0 for values in zip(*heights.values(), strict=True)]
    shares = {name: [100 * v / w for v, w in zip(values, whole, strict=True)] for name, values in heights.items()}
    _stack(axes, columns, {name: (shares[name], SERIES[colour]) for name, colour in TIMES.items()})
    total = sum(whole)
    words = ", ".join(f"{name} {100 * sum(values) / total:.3g} %" for name, values in heights.items())
    axes.set_ylim(0, 100)
    return _figure(axes, "Where clients' time goes", "Shares of the time of all clients.", list(TIMES.items()), words)


def _fates(course: Course) -> Figure:
    """Clients a round, by what became of them."""
    axes = _canvas("round", "")
    columns = _stretches(course)
    fates = {
        "counted": ("updates", SENT),
        "late": ("late", LOSS),
        "surplus": ("surplus", GREY),
        "lost": ("lost", ROBUST),
    }
    means = {
        name: ([sum(int(r[key]) for r in own) / len(own) for own in columns], SERIES[colour])
        for name, (key, colour) in fates.items()
    }
    _stack(axes, columns, means)
    shown = [(name, fates[name][1]) for name, (values, _) in means.items() if any(values)]
    totals = (f"{name} {sum(int(r[key]) for r in course.rounds):,}" for name, (key, _) in fates.items())
    caption = "Mean number of clients a round, by what became of their updates."
    return _figure(axes, "Clients in a round", caption, shown, ", ".join(totals))


def _took_part(course: Course) -> Figure:
    """The map: a row for each client, or band of client numbers; a colour for the share of rounds it counted in."""
    number, bands = int(course.begun["num_clients"]), len(course.rounds[0]["took_part"])
    firsts = [-(-number * i // bands) for i in range(bands + 1)]
    sizes = [b - a for a, b in pairwise(firsts)]
    names = [f"{first:,}" for first in firsts[:-1]]
    stretches = []
    for own in _stretches(course):
        means = [sum(int(r["took_part"][i]) for r in own) / len(own) / sizes[i] for i in range(bands)]
        stretches.append(Stretch(int(own[0]["round"]), int(own[-1]["round"]) + 1, dict(zip(names, means, strict=True))))
    high = max(max(one.values.values()) for one in stretches)
    width = next((width for width in _WIDTHS if len(SCALE) * width >= high), _WIDTHS[-1])
    edges = [width * i for i in range(len(SCALE) + 1)]
    rows = "a client" if bands == number else f"up to {max(sizes):,} clients, named by the first number"
    caption = f"A row is {rows}; colours: share of rounds in which a client's update counted."
    return heat_map(
        [Phase("", "", 0, stretches[-1].end)], [], names, stretches, edges, "Who took part", caption, "round"
    )


def _stretches(course: Course) -> list[list[Record]]:
    """The rounds in up to MAX_STRETCHES equal pieces."""
    size = -(-len(course.rounds) // MAX_STRETCHES)
    return [list(course.rounds[first : first + size]) for first in range(0, len(course.rounds), size)]


def _stack(axes: Axes, columns: list[list[Record]], heights: dict[str, tuple[list[float], str]]) -> None:
    """Steps on top of each other, one a stretch of rounds."""
    edges = [int(own[0]["round"]) for own in columns] + [int(columns[-1][-1]["round"]) + 1]
    bottom = [0.0] * len(edges)
    for values, colour in heights.values():
        top = [a + b for a, b in zip(bottom, [*values, values[-1]], strict=True)]
        axes.fill_between(edges, bottom, top, step="post", color=colour, linewidth=0)
        bottom = top
    axes.set_xlim(0, edges[-1])


def _canvas(label: str, unit: str) -> Any:
    """Axes of a new drawing. unit: text after the numbers of the vertical one."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes = Canvas(figsize=(5.4, 2.7), layout="constrained").add_subplot()
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=label == "round"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}{unit}"))
    return axes


def _figure(axes: Any, title: str, caption: str, legend: list[tuple[str, int]], words: str) -> Figure:
    view, svg = drawing(axes.figure, title)
    shown = [(label, PAGE_COLOURS[SERIES[colour]]) for label, colour in legend] if len(legend) > 1 else []
    return Figure(title, caption, shown, f"{title}: {words}", view, svg)
