"""The curves of the report: records of one run -> SVG fragments that take their colours from the page.

Every curve runs over the steps of all phases, one after the other. Colours are written as placeholders and
replaced by CSS variables, so that the same drawing serves a light and a dark page; text stays text.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from distrobust.errors import ConfigError
from distrobust.metrics.console import megabytes
from distrobust.report.story import Phase, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# placeholder -> what it becomes on the page; no drawing uses these colours for anything else
_TEXT, _GRID = "#010101", "#010102"
SERIES = tuple(f"#0102{number:02x}" for number in range(5))
SCALE = tuple(f"#0103{number:02x}" for number in range(8))  # from low to high, of a map
PAGE_COLOURS = (
    {_TEXT: "var(--muted)", _GRID: "var(--line)"}
    | {colour: f"var(--c{number})" for number, colour in enumerate(SERIES)}
    | {colour: f"var(--h{number})" for number, colour in enumerate(SCALE)}
)
CLEAN, ROBUST, LOSS, GREY, SENT = 0, 1, 2, 3, 4  # numbers of series colours

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text as text: small, selectable, in the page's font
    "text.parse_math": False,  # a dollar sign in a group's name is a dollar sign
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "axes.formatter.use_mathtext": False,
}


@dataclass(frozen=True)
class Figure:
    """One plot.

    legend: (label, CSS colour) of each curve, empty for a single one. alt: the plot in words.
    svg: the content of an <svg> element with viewBox `view`, safe to put into a page; the rest is plain text.
    """

    title: str
    caption: str
    legend: list[tuple[str, str]]
    alt: str
    view: str
    svg: str


@dataclass(frozen=True)
class Series:
    """What one curve shows: `value` of each of a phase's `records`, None where it was not measured."""

    label: str
    colour: int
    value: Callable[[Record], float | None]
    records: Literal["steps", "epochs", "watches"] = "steps"
    faint: bool = False


def figures(phases: Sequence[Phase], restarts: Sequence[int]) -> list[Figure]:
    """Every plot of curves with at least one value. `restarts`: steps over all phases at which a restart resumed."""
    with style():
        drawn = [_figure(phases, restarts, **plot) for plot in _plots()]
    return [figure for figure in drawn if figure is not None]


def style() -> Any:
    """The context to draw in. ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "the report needs matplotlib, which is not installed: pip install 'distrobust[plots]'"
        ) from error
    return matplotlib.rc_context(STYLE)


def _plots() -> list[dict[str, Any]]:
    """The plots, in reading order."""
    return [
        {
            "title": "Accuracy",
            "caption": "On held-out data, once per epoch; the thin line is on the inputs trained on.",
            "series": [
                Series("training inputs", GREY, _get("accuracy", 100), faint=True),
                Series("clean", CLEAN, _get("clean_accuracy", 100), records="epochs"),
                Series("robust", ROBUST, _get("robust_accuracy", 100), records="epochs"),
            ],
            "unit": " %",
            "bottom": 0,
        },
        {
            "title": "One step against ten",
            "caption": "Held-out accuracy at the radius of the moment; curves that part are catastrophic overfitting.",
            "series": [
                Series("under FGSM", CLEAN, _get("fgsm_accuracy", 100), records="watches"),
                Series("under PGD-10", ROBUST, _get("pgd_accuracy", 100), records="watches"),
            ],
            "unit": " %",
            "bottom": 0,
        },
        {
            "title": "Loss",
            "caption": "On the inputs trained on; those of fine-tuning are adversarial.",
            "series": [Series("loss", LOSS, _get("loss"))],
            "bottom": 0,
        },
        {
            "title": "Bytes sent",
            "caption": "Per worker since the start of the phase, as counted at the transport; logarithmic.",
            "series": [
                Series("dense fp32 all-reduce", GREY, _get("dense_bytes", 1e-6)),
                Series("sent", SENT, _get("sent_bytes", 1e-6)),
            ],
            "unit": " MB",
            "log": True,
            "ends": True,
        },
        {
            "title": "Density",
            "caption": "Fraction of gradient coordinates sent; 1 is dense. Logarithmic.",
            "series": [Series("density", SENT, _get("density"))],
            "log": True,
        },
        {
            "title": "Learning rate",
            "caption": "As scheduled, before the ratio of each layer group.",
            "series": [Series("learning rate", CLEAN, _get("lr"))],
            "bottom": 0,
        },
        {
            "title": "Attack radius",
            "caption": "Of the adversarial examples trained on, where 1 is the range of a pixel.",
            "series": [Series("eps", ROBUST, lambda record: record.get("eps") or None)],
            "bottom": 0,
        },
        {
            "title": "Step time",
            "caption": "Wall time of a step, of its attack and of its communication hook (waiting excluded).",
            "series": [
                Series("whole step", GREY, _get("step_s", 1e3)),
                Series("attack", ROBUST, _get("attack_s", 1e3)),
                Series("hook", SENT, _get("hook_s", 1e3)),
            ],
            "unit": " ms",
            "bottom": 0,
        },
        {
            "title": "Residual",
            "caption": "Norm of what is kept back for later steps over the norm of the gradient.",
            "series": [Series("residual", LOSS, _get("residual_norm_ratio"))],
            "bottom": 0,
        },
    ]


def _figure(
    phases: Sequence[Phase],
    restarts: Sequence[int],
    *,
    title: str,
    caption: str,
    series: Sequence[Series],
    unit: str = "",
    bottom: float | None = None,
    log: bool = False,
    ends: bool = False,
) -> Figure | None:
    """Draws one plot, or returns None when no series has a value to show.

    unit: text after the numbers of the vertical axis. bottom: its lower end. log: logarithmic, so values must
    be above 0. ends: writes the last value of each curve at its end.
    """
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.4, 2.7), layout="constrained")
    axes = canvas.add_subplot()
    if log:
        axes.set_yscale("log")
    drawn = [(one, _draw(axes, phases, one, log)) for one in series]
    shown = [(one, points) for one, points in drawn if points]
    if not shown:
        return None
    if ends:
        axes.margins(y=0.15)
        for one, points in shown:
            _write_end(axes, points[-1], unit, SERIES[one.colour])
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    mark(axes, phases, restarts)
    _label(axes, unit, log)
    legend = [(one.label, PAGE_COLOURS[SERIES[one.colour]]) for one, _ in shown]
    words = (f"{one.label} from {points[0][1]:.3g} to {points[-1][1]:.3g}{unit}" for one, points in shown)
    view, svg = drawing(canvas, title)
    return Figure(title, caption, legend if len(legend) > 1 else [], f"{title}: {', '.join(words)}", view, svg)


def _draw(axes: "Axes", phases: Sequence[Phase], series: Series, log: bool) -> list[tuple[int, float]]:
    """Draws one series, a separate curve per phase. Returns its points (step over all phases, value)."""
    colour = SERIES[series.colour]
    every: list[tuple[int, float]] = []
    for phase in phases:
        records: Sequence[Record] = getattr(phase, series.records)
        values = [(phase.offset + int(record["step"]), series.value(record)) for record in records]
        points = [(x, y) for x, y in values if y is not None and math.isfinite(y) and (y > 0 or not log)]
        if not points:
            continue
        every += points
        xs, ys = [x for x, _ in points], [y for _, y in points]
        noisy = len(ys) > 80 and not log
        if noisy or series.faint:
            axes.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.5 if series.faint else 0.3)
        if not series.faint:
            dots = "o" if series.records != "steps" or len(xs) == 1 else ""
            axes.plot(xs, _smooth(ys) if noisy else ys, color=colour, marker=dots, markersize=4)
    return every


def _write_end(axes: "Axes", point: tuple[int, float], unit: str, colour: str) -> None:
    """Writes the last value of a curve above its end."""
    text = megabytes(point[1] * 1e6) if unit == " MB" else f"{point[1]:.3g}{unit}"
    axes.annotate(text, point, (0, 5), textcoords="offset points", ha="right", color=colour)


def mark(axes: "Axes", phases: Sequence[Phase], restarts: Sequence[int]) -> None:
    """Phase boundaries as solid lines with the phases' names on top, restarts as dotted lines."""
    end = max(phase.offset + phase.num_steps for phase in phases)
    axes.set_xlim(0, max(1.01 * end, 1))
    for phase in phases:
        if phase.offset:
            axes.axvline(phase.offset, color=_TEXT, linewidth=0.8)
        if len(phases) > 1 and phase.num_steps > 0.15 * end:  # a name needs room
            middle = phase.offset + phase.num_steps / 2
            top = axes.get_xaxis_transform()
            axes.text(middle, 1.03, phase.title, transform=top, ha="center", fontsize=9)
    for step in restarts:
        axes.axvline(step, color=_TEXT, linewidth=1, linestyle=(0, (1, 3)))


def _label(axes: "Axes", unit: str, log: bool) -> None:
    """The numbers of both axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if log:
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}{unit}"))
    label_steps(axes)


def label_steps(axes: "Axes", unit: str = "step") -> None:
    """The numbers of a horizontal axis of steps, or of other whole numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(unit)


def drawing(canvas: Any, title: str) -> tuple[str, str]:
    """The viewBox and the content of the drawing, without anything that refers to the outside."""
    import matplotlib

    buffer = io.StringIO()
    # element ids: the same every time, no two plots alike
    with matplotlib.rc_context({"svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's font has it
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->\s*", "", buffer.getvalue(), flags=re.DOTALL)
    found = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', text, flags=re.DOTALL)
    assert found is not None, "matplotlib wrote something that is not an SVG drawing"
    view, body = found.groups()
    body = re.sub(r"'DejaVu Sans'[^;\"<]*", "var(--sans)", body)  # "<": a text that says so ends before its tag
    for placeholder, colour in PAGE_COLOURS.items():
        body = body.replace(placeholder, colour)
    return view, body


def _get(name: str, factor: float = 1.0) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        found = record.get(name)
        return None if found is None else factor * float(found)

    return value


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean over about a fortieth of the curve."""
    half = max(2, len(values) // 80)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
