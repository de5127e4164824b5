"""The plot of `distrobust ensemble`: clean against robust accuracy of every mixture, from the record it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distrobust.errors import ConfigError


def draw(record: Path, path: Path) -> None:
    """Writes an SVG, PNG or PDF by the ending of `path`. One curve a budget, from a = 0 to a = 1, with 95 % intervals;
    the chosen mixture is ringed, the test file's numbers are crosses. ConfigError without matplotlib."""
    check()
    from matplotlib.figure import Figure

    content = json.loads(record.read_text())
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for number in range(1, len(content["points"][0]["scores"])):
        _curve(axes, content, number)
    axes.set(xlabel="clean accuracy, %", ylabel="robust accuracy, %")
    axes.set_title(f"a chosen on held-out rows: {content['chosen']:g}; batch-norm statistics: {content['statistics']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def check() -> None:
    """ConfigError without matplotlib: better before the measurement than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "ensemble --out: the plot needs matplotlib, which is not installed: pip install 'distrobust[plots]'"
        ) from error


def _curve(axes: Any, content: dict[str, Any], number: int) -> None:
    """That of one budget, `number` in the list of scores."""
    points, tested, colour = content["points"], content["test"], f"C{number - 1}"
    clean = [point["scores"][0] for point in points]
    robust = [point["scores"][number] for point in points]
    xs, ys = [100 * one["accuracy"] for one in clean], [100 * one["accuracy"] for one in robust]
    axes.errorbar(
        xs,
        ys,
        xerr=[[100 * (s["accuracy"] - s["low"]) for s in clean], [100 * (s["high"] - s["accuracy"]) for s in clean]],
        yerr=[[100 * (s["accuracy"] - s["low"]) for s in robust], [100 * (s["high"] - s["accuracy"]) for s in robust]],
        color=colour,
        marker="o",
        markersize=4,
        elinewidth=0.6,
        label=f"{robust[0]['attack']}, held-out rows",
    )
    for point, x, y in zip(points, xs, ys, strict=True):
        axes.annotate(f"{point['a']:.3g}", (x, y), (4, 4), textcoords="offset points", fontsize=7)
        if point["a"] == content["chosen"]:
            axes.plot([x], [y], marker="o", markersize=11, fillstyle="none", color=colour)
    axes.plot(
        [100 * point["scores"][0]["accuracy"] for point in tested],
        [100 * point["scores"][number]["accuracy"] for point in tested],
        color=colour,
        marker="x",
        linestyle="none",
        label=f"{robust[0]['attack']}, test file",
    )
