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


def _percent(values: dict[str, Any]) -> str:
    return f"{100 * values['mean']:.1f} +- {100 * values['half_width_95']:.1f}"


if __name__ == "__main__":
    print("\n".join(cifar10()))
