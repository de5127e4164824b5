"""Draws the frontier: accuracy against the bytes of the whole run, every method of the accuracy record, as an SVG.

python benchmarks/frontier.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
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
    rows = [r for r in json.loads((RESULTS / "accuracy.json").read_text())["rows"] if r["task"] == "n_fgsm"]
    groups = sorted({(r["epochs"], r["workers"]) for r in rows})
    figure, axes = plt.subplots(len(groups), 2, figsize=(12, 4.2 * len(groups)), squeeze=False)
    for (epochs, workers), pair in zip(groups, axes, strict=True):
        chosen = [r for r in rows if (r["epochs"], r["workers"]) == (epochs, workers)]
        for key, axis in zip(("clean", "pgd20"), pair, strict=True):
            floor = 100 * max(row[key]["mean"] for row in chosen) - BELOW
            for number, row in enumerate(sorted(chosen, key=lambda r: (megabytes(r), -r[key]["mean"]))):
                draw(axis, row, key, floor, number)
            axis.set_xscale("log")
            axis.set_xlabel("MB sent by a worker over the whole run")
            axis.set_ylabel({"clean": "clean accuracy, %", "pgd20": "PGD-20 8/255 accuracy, %"}[key])
            axis.set_title(f"N-FGSM fine-tuning, {epochs} epochs, {workers} workers", fontsize=10)
            axis.grid(alpha=0.3)
    figure.tight_layout()
    path = RESULTS / "frontier.svg"
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
