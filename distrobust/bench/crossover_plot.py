"""The plot of `distrobust bench crossover`: lines are computed, points are measured in the lab.

Left: step time against the number of workers, one a machine, on the given link; dotted, the same for the lab, whose
hosts share cores, through the points measured there. Right: step time against bandwidth for a few workers, with the
crossover where a sparse line meets a dense one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distrobust.bench.crossover import WORKERS, Machine, Network
from distrobust.bench.methods import DENSE, FP16
from distrobust.bench.validation import Point
from distrobust.errors import ConfigError
from distrobust.lab.link import GOODPUT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW = 8  # workers of the right half
_MARKERS = {"dense": "s", "all_gather": "o", "sharded": "^"}


def draw(
    path: Path,
    machine: Machine,
    network: Network,
    points: Sequence[Point],
) -> None:
    """Writes a PNG, SVG or PDF by the ending of `path`. `points`: of the lab, none if there was none."""
    check(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    methods = [DENSE, FP16, *machine.sparse]
    colours = {name: f"C{number}" for number, name in enumerate(methods)}
    for name in methods:
        seconds = [machine.cost(name, n, network).seconds(network.bytes_per_s, network.latency_s) for n in WORKERS]
        left.plot(WORKERS, seconds, color=colours[name], label=f"{name}, computed")
    _lab(left, points, colours)
    left.set(xscale="log", yscale="log", xlabel="workers", ylabel="seconds a step")
    left.set_xticks(WORKERS, [str(n) for n in WORKERS])
    left.set_title(f"{network.bits_per_s / 1e6:.4g} Mbit/s, {network.latency_s * 1e3:.3g} ms")
    _against_bandwidth(right, machine, network, methods, colours)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def check(path: Path) -> None:
    """ConfigError if nothing can be drawn to `path`: better before the measurement than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'distrobust[plots]'") from error
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot: got {path}, wanted a file that ends in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: {path.parent} is no directory")


def _lab(axes: Axes, points: Sequence[Point], colours: dict[str, str]) -> None:
    """The measured points with their quartiles, and dotted lines through what was predicted for them."""
    for name, exchange in dict.fromkeys((point.method, point.exchange) for point in points):
        mine = [point for point in points if (point.method, point.exchange) == (name, exchange)]
        hosts, predicted = [point.num_hosts for point in mine], [point.predicted_s for point in mine]
        axes.plot(hosts, predicted, color=colours[name], linestyle=":", linewidth=1)
        axes.errorbar(
            hosts,
            [point.measured_s for point in mine],
            yerr=[
                [point.measured_s - point.lower_s for point in mine],
                [point.upper_s - point.measured_s for point in mine],
            ],
            color=colours[name],
            marker=_MARKERS[exchange],
            linestyle="none",
            markersize=4,
            label=f"{name}, {exchange}, measured (lab)",
        )


def _against_bandwidth(
    axes: Axes, machine: Machine, network: Network, methods: Sequence[str], colours: dict[str, str]
) -> None:
    bits_per_s = np.logspace(6, 11, 200)
    for name in methods:
        seconds = []
        for bits in bits_per_s:
            link = Network(float(bits) / 8 * GOODPUT, network.latency_s)
            seconds.append(machine.cost(name, _FEW, link).seconds(link.bytes_per_s, link.latency_s))
        axes.plot(bits_per_s / 1e6, seconds, color=colours[name])
    for name in machine.sparse:
        for rival in (DENSE, FP16):
            crossing = machine.crossover(name, rival, _FEW, network.latency_s)
            if 1e6 < crossing < 1e11:
                axes.axvline(crossing / 1e6, color=colours[name], linestyle="--" if rival == FP16 else "-", alpha=0.4)
    axes.axvline(network.bits_per_s / 1e6, color="black", linewidth=0.8, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="Mbit/s, headers included", ylabel="seconds a step")
    axes.set_title(f"{_FEW} workers; upright lines: crossover with dense, dashed with 16-bit", fontsize=9)
