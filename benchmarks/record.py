"""A record: what was measured, with everything needed to judge and repeat it, as one JSON file in results/."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# Student's t, 97.5 %, by degrees of freedom: intervals over a handful of seeds
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and half-width of the 95 % interval of the mean over seeds (Student's t); no half-width for one value."""
    mean = statistics.fmean(values)
    half = None
    if len(values) > 1:
        half = _T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "half_width_95": half, "values": values}


def write(name: str, question: str, content: dict[str, Any]) -> Path:
    """Writes results/NAME.json."""
    import torch

    from distrobust import __version__

    record = {
        "question": question,
        "command": " ".join(["python", *(_without_folders(i, arg) for i, arg in enumerate(sys.argv))]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": COMMIT,
        "versions": {"distrobust": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": {"processor": _processor(), "cores": os.cpu_count()},
        **content,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _without_folders(position: int, argument: str) -> str:
    """A record should not say where things lie on the machine that made it."""
    name = Path(argument).name if Path(argument).is_absolute() or position == 0 else argument
    return name if position else f"benchmarks/{name}"


def _commit() -> str:
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "../distrobust", "*.py"], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    return commit + ("+changes" if changed else "")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


COMMIT = _commit()  # at the start of the measurement, which is what was measured
