"""The maps of the report: a row for each layer group, a column for a stretch of steps, a colour for a value.

A record stands for the steps since the one before it. Columns are these stretches, or 60 equal ones where there are
more; a cell is the mean of the records in it, weighted by steps. Neighbours of one colour are drawn as one rectangle.
"""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from distrobust.report.plots import SCALE, STYLE, Figure, drawing, label_steps, mark
from distrobust.report.story import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_COLUMNS = 60
_RATIO_WIDTHS = (0.0025, 0.005, 0.01, 0.02, 0.025, 0.05, 0.1, 0.125)  # of one colour; eight of the last are 0 to 1
_ROOM = {"figure.constrained_layout.w_pad": 0.15}  # inches at the sides, for the larger type of a phone


@dataclass(frozen=True)
class Stretch:
    """What one record says of the steps from `start` to `end`, counted over all phases: {group: value}."""

    start: int
    end: int
    values: Mapping[str, float]


def heat_maps(phases: Sequence[Phase], restarts: Sequence[int]) -> list[Figure]:
    """The maps of a run that measured gradient noise; none of another. `restarts`: as for `figures`."""
    import matplotlib

    groups: dict[str, None] = {}  # in the model's order: a ratio has all of them from the first record on
    for phase in phases:
        for record in phase.steps:
            groups |= dict.fromkeys([*(record.get("layer_lr_ratio") or ()), *(record.get("layer_noise") or ())])
    ratios, noise = (_stretches(phases, field) for field in ("layer_lr_ratio", "layer_noise"))
    maps: list[Figure] = []
    with matplotlib.rc_context(STYLE | _ROOM):
        if any(value != 1 for one in ratios for value in one.values.values()):
            title = "Learning-rate ratio per layer group"
            caption = (
                "What gradient noise and model.rates make of the scheduled rate, mean over a group; 1 is all of it."
            )
            maps.append(heat_map(phases, restarts, list(groups), ratios, _ratio_edges(ratios), title, caption))
        if any(value > 0 for one in noise for value in one.values.values()):
            title = "Gradient noise per layer group"
            caption = "Norm of the difference of two independent mean gradients, over a group; logarithmic."
            maps.append(heat_map(phases, restarts, list(groups), noise, _noise_edges(noise), title, caption))
    return maps


def _stretches(phases: Sequence[Phase], field: str) -> list[Stretch]:
    """One per record, ascending; of its values those that are finite numbers."""
    found: list[Stretch] = []
    for phase in phases:
        start = phase.offset
        for record in phase.steps:
            values = {group: value for group, value in (record.get(field) or {}).items() if value is not None}
            end = phase.offset + int(record["step"])
            found.append(Stretch(start, end, {g: float(v) for g, v in values.items() if math.isfinite(v)}))
            start = end
    return found


def _ratio_edges(stretches: Sequence[Stretch]) -> list[float]:
    """Edges of the colours' ranges, ascending to 1 in steps of a round number."""
    lowest = min(value for one in stretches for value in one.values.values())
    width = next((width for width in _RATIO_WIDTHS if 1 - len(SCALE) * width <= lowest), _RATIO_WIDTHS[-1])
    return [round(1 - width * number, 4) for number in range(len(SCALE), -1, -1)]


def _noise_edges(stretches: Sequence[Stretch]) -> list[float]:
    """Edges of the colours' ranges, of two digits, at equal factors that make at least 4: small changes look small."""
    values = [value for one in stretches for value in one.values.values() if value > 0]
    low, high = math.log(min(values)), math.log(max(*values, 4 * min(values)))
    exact = (math.exp(low + (high - low) * number / len(SCALE)) for number in range(len(SCALE) + 1))
    return [float(f"{edge:.2g}") for edge in exact]


def _columns(stretches: Sequence[Stretch]) -> list[float]:
    """Edges of the columns, in steps."""
    edges: list[float] = sorted({place for one in stretches for place in (one.start, one.end)})
    if len(edges) <= _MAX_COLUMNS + 1:
        return edges
    return [edges[0] + (edges[-1] - edges[0]) * number / _MAX_COLUMNS for number in range(_MAX_COLUMNS + 1)]


def _row(group: str, stretches: Sequence[Stretch], columns: Sequence[float]) -> list[float | None]:
    """The mean value of one group in each column, None where it has none."""
    sums, weights = [0.0] * (len(columns) - 1), [0.0] * (len(columns) - 1)
    for one in stretches:
        if group not in one.values:
            continue
        number = bisect(columns, one.start) - 1
        while number < len(sums) and columns[number] < one.end:
            weight = min(columns[number + 1], one.end) - max(columns[number], one.start)
            sums[number] += weight * one.values[group]
            weights[number] += weight
            number += 1
    return [total / weight if weight else None for total, weight in zip(sums, weights, strict=True)]


def heat_map(
    phases: Sequence[Phase],
    restarts: Sequence[int],
    groups: Sequence[str],
    stretches: Sequence[Stretch],
    edges: Sequence[float],
    title: str,
    caption: str,
    unit: str = "step",
) -> Figure:
    """Draws one map. edges: (len(SCALE) + 1) of the colours' ranges; what is beyond has the colour of the end.

    unit: what columns count.
    """
    from matplotlib.figure import Figure as Canvas

    every = {group: [one.values[group] for one in stretches if group in one.values] for group in groups}
    shown = [group for group in groups if every[group]]
    canvas = Canvas(figsize=(5.4, max(2.7, 0.8 + 0.17 * len(shown))), layout="constrained")
    axes = canvas.add_subplot()
    columns = _columns(stretches)
    for number, group in enumerate(shown):
        _draw(axes, number, columns, [_colour(value, edges) for value in _row(group, stretches, columns)])
    axes.grid(visible=False)
    axes.set_ylim(len(shown), 0)
    axes.set_yticks([number + 0.5 for number in range(len(shown))], [_short(group) for group in shown])
    mark(axes, phases, restarts)
    label_steps(axes, unit)
    _draw_scale(axes, edges)
    words = (f"{group} from {every[group][0]:.3g} to {every[group][-1]:.3g}" for group in shown)
    view, svg = drawing(canvas, title)
    return Figure(title, caption, [], f"{title}: {', '.join(words)}", view, svg)


def _colour(value: float | None, edges: Sequence[float]) -> str | None:
    if value is None:
        return None
    return SCALE[min(max(bisect(edges, value) - 1, 0), len(SCALE) - 1)]


def _draw(axes: "Axes", number: int, columns: Sequence[float], colours: Sequence[str | None]) -> None:
    """One row, `number` from the top: a rectangle for each run of equal colours."""
    bars: list[tuple[float, float]] = []
    filled: list[str] = []
    place = 0
    for colour, run in groupby(colours):
        first, place = place, place + len(list(run))
        if colour is not None:
            bars.append((columns[first], columns[place] - columns[first]))
            filled.append(colour)
    axes.broken_barh(bars, (number + 0.04, 0.92), facecolors=filled, linewidth=0)


def _draw_scale(axes: "Axes", edges: Sequence[float]) -> None:
    """The colours with the edges of their ranges, beside the map."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    assert axes.figure is not None
    colours = ScalarMappable(BoundaryNorm(edges, len(SCALE)), ListedColormap(SCALE))
    bar = axes.figure.colorbar(colours, ax=axes, ticks=edges, aspect=16, pad=0.02)
    bar.ax.set_yticklabels([f"{edge:,.6g}" for edge in edges])
    bar.ax.grid(visible=False)
    bar.outline.set_visible(False)


def _short(name: str) -> str:
    """A name that leaves room for the map: its beginning and its end."""
    name = " ".join(name.split())
    return name if len(name) <= 12 else f"{name[:6]}\u2026{name[-5:]}"
