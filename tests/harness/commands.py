"""The command line in processes of its own, on a small job file, and what a run has left."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families

from distrobust.metrics import jsonl
from distrobust.train.modelfile import read_model_file

CLI = [sys.executable, "-m", "distrobust"]


def train(file: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, "train", str(file), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float = 200) -> str:
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return output


def records(run: Path, event: str) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [r for r in jsonl.read(path) if r["event"] == event] if path.exists() else []


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def scraped(run: Path, rank: int, metric: str) -> float:
    """The sum of a metric over its labels, from the address the worker left for Prometheus."""
    (target,) = json.loads((run / f"prometheus/rank-{rank}.json").read_text())[0]["targets"]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return sum(sample.value for family in families for sample in family.samples if sample.name == metric)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_model_file(run / "models/fine-tuned.pt")["state"]  # type: ignore[no-any-return]


def assert_same_models(ours: Path, theirs: Path) -> None:
    a, b = weights(ours), weights(theirs)
    assert not [name for name, tensor in a.items() if not torch.equal(tensor, b[name])]
