"""Draws the frontier: accuracy against the bytes of the whole run, every method of the accuracy record, as SVGs.

python benchmarks/frontier.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
TASKS = {"n_fgsm": "N-FGSM fine-tuning", "natural": "natural training from scratch"}
BELOW = 15.0  # percentage points under the best that a panel shows
FAMILIES = {  # first word of the method: colour, marker
    "dense": ("black", "s"),
    "16-bit": ("dimgray", "s"),
    "auto": ("tab:red", "o"),
    "step-ahead": ("tab:orange", "o"),
    "DGC": ("tab:blue", "^"),
    "PowerSGD": ("tab:green", "D"),
    "local": ("tab:purple", "v"),
    "1.0%": ("tab:gray", "x"),
}


def main() -> None:
    rows = [r for r in json.loads((RESULTS / "accuracy.json").read_text())["rows"] if "share" not in r["options"]]
    settings = Counter((r["task"], r["epochs"], r["workers"]) for r in rows if r["task"] in TASKS)
    panels = [(s, key) for s, _ in settings.most_common() if s[0] == "n_fgsm" for key in ("clean", "pgd20")]
    panels += [(s, "clean") for s, _ in settings.most_common() if s[0] == "natural"]
    page("frontier", panels[:2], rows)  # the setting with the most methods
    page("frontier_more", panels[2:], rows)


def page(name: str, panels: list[tuple[tuple[str, int, int], str]], rows: list[dict[str, Any]]) -> None:
    """Writes an SVG: a panel for each setting (task, epochs, workers) and accuracy, two side by side."""
    num_lines = -(-len(panels) // 2)
    figure, axes = plt.subplots(num_lines, 2, figsize=(12, 4.2 * num_lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for (setting, key), axis in zip(panels, axes.flat, strict=False):
        task, epochs, workers = setting
        chosen = [r for r in rows if (r["task"], r["epochs"], r["workers"]) == setting]
        floor = 100 * max(row[key]["mean"] for row in chosen) - BELOW
        for number, row in enumerate(sorted(chosen, key=lambda r: (megabytes(r), -r[key]["mean"]))):
            draw(axis, row, key, floor, number)
        axis.set_xscale("log")
        axis.set_xlabel("MB sent by a worker over the whole run")
        axis.set_ylabel({"clean": "clean accuracy, %", "pgd20": "PGD-20 8/255 accuracy, %"}[key])
        length = "1 epoch" if epochs == 1 else f"{epochs} epochs"
        axis.set_title(f"{TASKS[task]}, {length}, {workers} workers", fontsize=10)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path = RESULTS / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    print(path)


def megabytes(row: dict[str, Any]) -> float:
    return row["runs"][0]["sent_bytes"] / 1e6


def draw(axis: Any, row: dict[str, Any], key: str, floor: float, number: int) -> None:
    """One point, with the 95 % interval over seeds where there are several; below the floor an arrow and its value."""
    colour, marker = FAMILIES.get(row["method"].split()[0].rstrip(","), ("tab:brown", "."))
    half, mean = row[key]["half_width_95"], 100 * row[key]["mean"]
    label, y, bar = row["method"], mean, None if half is None else 100 * half
    if mean < floor:
        label, y, bar, marker = f"{label}: {mean:.1f}", floor, None, r"$\downarrow$"
    axis.errorbar(megabytes(row), y, bar, color=colour, marker=marker, capsize=3, linewidth=0.8)
    above = 8 * (number % 4) - 12  # neighbours' labels at four heights
    axis.annotate(label, (megabytes(row), y), fontsize=6, xytext=(4, above), textcoords="offset points", color=colour)


if __name__ == "__main__":
    main()
