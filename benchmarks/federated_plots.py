"""One page of plots from the federated records, as an SVG.

python benchmarks/federated_plots.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
TITLES = {"digits": "digits, MLP of 9,610 parameters", "cifar10": "CIFAR-10, MLP of 394,634 parameters"}
METHODS: list[str] = []  # each has its colour
SHOWN = {"local": "local", "global": "FedAvg", "ftfa": "FTFA", "rtfa": "RTFA"}


def main() -> None:
    METHODS[:] = dict.fromkeys(row["method"] for row in read("federated_compression_digits")["rows"])
    figure = plt.figure(figsize=(24, 15), layout="constrained")
    grid = figure.add_gridspec(3, 20)  # four plots, four, five
    axes = [[figure.add_subplot(grid[row, 5 * i : 5 * i + 5]) for i in range(4)] for row in range(2)]
    last = [figure.add_subplot(grid[2, 4 * i : 4 * i + 4]) for i in range(5)]
    for row, task in zip(axes, TITLES, strict=True):
        found = read(f"federated_compression_{task}")
        for pair, alpha in ((row[:2], 0.1), (row[2:], 1.0)):
            curves(pair, [one for one in found["rows"] if one["alpha"] == alpha], f"{TITLES[task]}, Dirichlet {alpha}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    for own, attacked, task in zip(last[:2], last[2:4], TITLES, strict=True):
        personal(own, read(f"federated_personal_{task}")["rows"], task)
        robust(attacked, read(f"federated_robust_{task}")["rows"], task)
    speed(last[4], read("federated_speed")["rows"])
    path = RESULTS / "federated.svg"
    figure.savefig(path, metadata={"Date": None})
    print(path)


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def curves(pair: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Held-out accuracy, mean over seeds: against MB, then against simulated time."""
    for row in rows:
        colour = f"C{METHODS.index(row['method'])}"
        points = list(zip(*(run["points"] for run in row["runs"]), strict=True))
        ys = [100 * statistics.fmean(point["accuracy"] for point in own) for own in points]
        megabytes = [statistics.fmean(point["down_mb"] + point["up_mb"] for point in own) for own in points]
        seconds = [statistics.fmean(point["s"] for point in own) for own in points]
        for axis, xs in zip(pair, (megabytes, seconds), strict=True):
            axis.plot(xs, ys, color=colour, marker="o", markersize=3, label=row["method"])
    pair[0].set(xscale="log", xlabel="MB, both directions, all clients", ylabel="held-out accuracy, %")
    pair[1].set(xlabel="simulated seconds", ylabel="held-out accuracy, %")
    for axis in pair:
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)


def bars(axis: Any, groups: dict[str, dict[str, dict[str, Any]]], title: str) -> None:
    """group -> bar -> interval."""
    names = list(next(iter(groups.values())))
    for number, name in enumerate(names):
        found = [own[name] for own in groups.values()]
        xs = [i + number / (len(names) + 1) for i in range(len(groups))]
        heights = [100 * one["mean"] for one in found]
        axis.bar(
            xs, heights, 1 / (len(names) + 1), label=name, yerr=[100 * (one["half_width_95"] or 0) for one in found]
        )
        for x, y in zip(xs, heights, strict=True):
            axis.annotate(f"{y:.1f}", (x, 2), ha="center", fontsize=8, rotation=90, color="white")
    axis.set_xticks([i + (len(names) - 1) / 2 / (len(names) + 1) for i in range(len(groups))], list(groups), fontsize=7)
    axis.set_ylim(0, 125)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, loc="upper right", ncols=4)


def personal(axis: Any, rows: list[dict[str, Any]], task: str) -> None:
    groups = {
        f"Dirichlet {row['alpha']}": {SHOWN[name]: value for name, value in row["accuracies"].items()} for row in rows
    }
    bars(axis, groups, f"{task}: accuracy on clients' own test rows, %")


def robust(axis: Any, rows: list[dict[str, Any]], task: str) -> None:
    groups = {
        f"{row['method'].replace('adversarial', 'adv.')}\nDir. {row['alpha']}": {
            "clean": row["clean"],
            "PGD-20": row["robust"],
        }
        for row in rows
    }
    bars(axis, groups, f"{task}: natural and adversarial local training, %")


def speed(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Client updates a second, logarithmic."""
    found = [
        (f"{name}, {row['registered']:,}\n{row['model']}", one["updates_per_s"])
        for row in rows
        for name, one in row["contenders"].items()
        if "updates_per_s" in one
    ]
    axis.barh([label for label, _ in found][::-1], [value for _, value in found][::-1])
    axis.set_xscale("log")
    axis.tick_params(axis="y", labelsize=7)
    axis.set_title("client updates a second, wall time", fontsize=10)


if __name__ == "__main__":
    main()
