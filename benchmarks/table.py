"""Prints the README's results table from the records, so that no figure there is typed by hand.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "pre-trained, clean": "natural model, clean",
    "pre-trained, PGD-20 Linf 8/255": "natural model, PGD-20 8/255",
    "fine-tuned, clean": "fine-tuned, clean",
    "fine-tuned, PGD-20 Linf 8/255": "fine-tuned, PGD-20 8/255, 2,000 images",
    "fine-tuned, PGD-20 Linf 8/255 (foolbox)": "fine-tuned, foolbox PGD-20 8/255, 1,000 images",
}


def cifar10(name: str = "cifar10") -> list[str]:
    """The lines of the CIFAR-10 table: dense against compressed, mean over seeds with its 95 % interval."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    summary = record["summary"]
    lines = [
        f"| CIFAR-10, %, mean of {len(record['seeds'])} seeds +- 95 % | dense | compressed |",
        "| --- | --- | --- |",
    ]
    for key, label in NAMES.items():
        dense, compressed = (_percent(summary[variant][key]) for variant in ("dense", "compressed"))
        lines.append(f"| {label} | {dense} | {compressed} |")
    fewer = [summary[variant]["fewer_bytes"]["mean"] for variant in ("dense", "compressed")]
    lines.append(f"| times fewer bytes over the whole fine-tuning | {fewer[0]:.1f} | {fewer[1]:.1f} |")
    return lines


KEYS = {"clean", "pgd20"}
EXAMPLES = {"n_fgsm": "N-FGSM", "pgd7": "PGD-7"}


def accuracy(*tasks: str, name: str = "accuracy") -> list[str]:
    """The rows of some tasks in the accuracy record: N workers inside one process. Intervals from three seeds on."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [row for task in tasks for row in record["rows"] if row["task"] == task]
    robust = any("pgd20" in row for row in rows)
    head = [
        *(["examples"] if robust else []),
        "method",
        "epochs",
        "workers",
        "clean",
        *(["PGD-20 8/255"] if robust else []),
        "times fewer bytes",
        "seeds",
    ]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for row in rows:
        digits = {
            key: {**row[key], "half_width_95": None} if len(row["runs"]) < 3 else row[key] for key in KEYS & {*row}
        }
        cells = [EXAMPLES[row["task"]]] if robust else []
        cells += [row["method"], str(row["epochs"]), str(row["workers"]), _percent(digits["clean"])]
        cells += [_percent(digits["pgd20"])] if robust else []
        cells += [f"{row['fewer_bytes']:.1f}", str(len(row["runs"]))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def step(name: str = "step") -> list[str]:
    """Step time and bytes between two hosts, for each link of the step record."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    links = list(record["links"])
    lines = [
        f"| ResNet-50's shapes, two hosts | {' | '.join(links)} |",
        "| --- |" + " --- |" * len(links),
    ]
    measured = [{row["name"]: row for row in record["links"][link]["rows"]} for link in links]
    for method in measured[0]:
        cells = [f"{rows[method]['median_s']:.3f} s, {rows[method]['wire_bytes'] / 1e6:.3f} MB" for rows in measured]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _percent(values: dict[str, Any]) -> str:
    half = values["half_width_95"]
    return f"{100 * values['mean']:.1f}" + ("" if half is None else f" +- {100 * half:.1f}")


if __name__ == "__main__":
    print("\n".join([*accuracy("n_fgsm", "pgd7"), "", *accuracy("natural"), "", *step(), "", *cifar10()]))
