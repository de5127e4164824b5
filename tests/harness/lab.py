"""Jobs on a Ray cluster in the slow-link lab, watched through their run directory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from distrobust.cluster.lab import Command, RayLab
from distrobust.metrics import jsonl
from distrobust.train.modelfile import read_model_file
from tests.train.conftest import write_stripes

TRAIN = [sys.executable, "-m", "distrobust", "train"]
TIMEOUT_S = 15.0  # of collectives, in every job here


def write_job(directory: Path, **sections: dict[str, Any] | list[dict[str, Any]] | None) -> Path:
    """Three workers: 16 steps of fine-tuning, a checkpoint after every second one; its run is directory/run."""
    values: dict[str, Any] = {
        "run": {"dir": str(directory / "run")},
        "cluster": {"workers": 3, "timeout_s": TIMEOUT_S, "max_failures": 6, "start_timeout_s": 180},
        "data": {"path": str(write_stripes(directory / "data", num_train=480)), "held_out": 0.2},
        "model": {"name": "cnn"},
        "train": {"epochs": 2, "batch_size": 48},
        "attack": {"name": "pgd", "steps": 2, "eps": 0.05},
        "compress": {"density": 0.02, "warmup": 0.1},
        "checkpoint": {"every": 2, "backoff_s": 0.05},
        "metrics": {"every": 1, "port": None},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def uninterrupted(job: Path, directory: Path) -> Path:
    """The run directory of the same job without faults, its three workers on this machine without Ray."""
    overrides = ["--set", f"run.dir={directory}", "--set", "faults=[]", "--set", "cluster.min_workers=null"]
    ran = subprocess.run(
        [*TRAIN, str(job), "--launcher", "torchrun", *overrides], capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return directory


def start(cluster: RayLab, job: Path, *overrides: str) -> Command:
    """The job's driver, in the head's host."""
    options = [part for o in [*overrides, f"cluster.address={cluster.address}"] for part in ("--set", o)]
    return cluster.start([*TRAIN, str(job), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(command: Command, seconds: float = 200.0) -> tuple[int, str]:
    """Exit code and output of a command; it must end by itself."""
    output, _ = command.process.communicate(timeout=seconds)
    return command.process.returncode, output.decode()


def records(run: Path, event: str) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [r for r in jsonl.read(path) if r["event"] == event] if path.exists() else []


def wait_for_step(run: Path, step: int, seconds: float = 120.0, start: int = 0) -> None:
    """Until the run, in a start of that number or later, has done so many steps."""
    wait_for(
        lambda: (
            len(records(run, "run")) > start
            and any(r["step"] >= step and r["time"] >= records(run, "run")[start]["time"] for r in records(run, "step"))
        ),
        f"step {step} of start {start}",
        seconds,
    )


def wait_for(what: Callable[[], bool], name: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {name}"
        time.sleep(0.05)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_model_file(run / "models/fine-tuned.pt")["state"]  # type: ignore[no-any-return]


def assert_same_bits(ours: Path, theirs: Path) -> None:
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    assert not [name for name, tensor in a.items() if not torch.equal(tensor, b[name])]
