"""What does compression bring the main job on a Ray cluster of three hosts at 100 Mbit/s?

    python benchmarks/multinode.py --data DIR [--links 100mbit 10mbit] [--epochs 2]

A natural model of launch/cifar10.yaml is trained once, on this machine. Then, on every link, two runs fine-tune it
through `distrobust train --set cluster.address=...` in a lab of three hosts with a Ray node in each: dense, and with
the file's compression. Only the first link's runs go to their end and are evaluated, the others' take --steps steps.
Bytes are those of every host's interface, packet headers and Ray's own traffic included, between two
records of the training phase; data and checkpoints are on this machine's disk and cross no link. All three hosts share
this machine's cores, so the time of computation is not that of three machines; what the link adds is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record

from distrobust import config as configuration
from distrobust.cluster.lab import RayLab, Traffic, ray_lab
from distrobust.lab.link import parse_link
from distrobust.metrics import jsonl

FILE = Path(__file__).parent.parent / "launch/cifar10.yaml"
HOSTS = 3
EVERY = 10
COMMON = ["train.batch_size=255", f"metrics.every={EVERY}", "metrics.port=null"]
IDLE_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with train.parquet and test.parquet")
    parser.add_argument("--links", nargs="+", default=["100mbit", "10mbit"])
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--pretrain-epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="on all links but the first")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-multinode"))
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    common = [*COMMON, f"data.path={arguments.data}", f"train.epochs={arguments.epochs}"]
    natural = work / "natural/models/pre-trained.pt"
    if not natural.exists():
        pretrain(work / "natural", [*common, f"pretrain.epochs={arguments.pretrain_epochs}"], natural)
    common += ["pretrain=null", f"model.weights={natural}", f"cluster.workers={HOSTS}"]
    runs: dict[str, dict[str, Any]] = {}
    for link in arguments.links:
        steps = None if link == arguments.links[0] else arguments.steps
        with ray_lab(HOSTS, parse_link(link)) as cluster:
            runs[link] = {
                name: run(cluster, work / f"{link}-{name}", [*common, *overrides], steps)
                for name, overrides in (("dense", ["compress=null"]), ("compressed", []))
            }
            runs[link]["ray alone, bytes a second"] = idle(cluster)
    for link, both in runs.items():
        for name in ("dense", "compressed"):
            one = both[name]
            print(f"{link:>8} {name:<11} {one['median_step_s']:.3f} s a step", one["wire_bytes_a_step"])
    config = configuration.load(FILE, [f"data.path={arguments.data.name}", *COMMON])
    print(
        record.write(
            "multinode",
            (__doc__ or "").splitlines()[0],
            {
                "setting": (__doc__ or "").split("\n\n")[2],
                "hosts": HOSTS,
                "epochs": arguments.epochs,
                "seeds": [config.run.seed],
                "configuration": config.model_dump(mode="json", exclude={"kubernetes"}),
                "runs": runs,
            },
        )
    )


def pretrain(directory: Path, overrides: list[str], wanted: Path) -> None:
    """Two workers without a lab, until the natural model is there; its fine-tuning is stopped at the first record."""
    with train([], directory, [*overrides, "cluster.launcher=torchrun", "train.batch_size=256"]) as process:
        while not wanted.exists() and process.poll() is None:
            time.sleep(0.5)
        (directory / "stop").touch()
        process.wait()


@contextlib.contextmanager
def train(enter: list[str], directory: Path, overrides: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    options = [part for override in [*overrides, f"run.dir={directory}"] for part in ("--set", override)]
    process = subprocess.Popen([*enter, sys.executable, "-m", "distrobust", "train", str(FILE), *options])
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


def run(cluster: RayLab, directory: Path, overrides: list[str], num_steps: int | None) -> dict[str, Any]:
    """One run in the lab; ended by a stop request after `num_steps`, if given."""
    overrides = [*overrides, f"run.dir={directory}", f"cluster.address={cluster.address}"]
    options = [part for override in overrides for part in ("--set", override)]
    command = cluster.start([sys.executable, "-m", "distrobust", "train", str(FILE), *options])
    marks: list[tuple[int, dict[int, Traffic]]] = []  # step of a record -> every interface's counters when it came
    while command.process.poll() is None:
        steps = records(directory, "step")
        if steps and (not marks or steps[-1]["step"] > marks[-1][0]):
            marks.append((steps[-1]["step"], cluster.traffic()))
        if num_steps is not None and steps and steps[-1]["step"] >= num_steps:
            (directory / "stop").touch()
        time.sleep(0.05)
    if trouble := cluster.trouble():
        sys.exit(trouble)
    steps = records(directory, "step")
    (first, before), (last, after) = marks[0], marks[-1]
    start = records(directory, "run")[-1]
    return {
        "median_step_s": statistics.median(step["step_s"] for step in steps[1:]),
        "steps": steps[-1]["step"],
        "num_parameters": start["num_parameters"],
        "interface": start["interface"],
        "wire_bytes_a_step": {
            f"host {host}": {
                "sent": (after[host].sent.bytes - before[host].sent.bytes) / (last - first),
                "received": (after[host].received.bytes - before[host].received.bytes) / (last - first),
            }
            for host in after
        },
        "wire_bytes_measured_over_steps": [first, last],
        "transport_sent_bytes": steps[-1]["sent_bytes"],
        "transport_dense_bytes": steps[-1]["dense_bytes"],
        "density": steps[len(steps) // 2]["density"],
        "scores": [
            {key: r[key] for key in ("model", "attack", "accuracy", "low", "high", "samples", "seed", "flags")}
            for r in records(directory, "evaluation")
        ],
    }


def idle(cluster: RayLab) -> dict[str, float]:
    """What Ray itself sends while no job runs, in bytes a second at every interface."""
    before, started = cluster.traffic(), time.monotonic()
    time.sleep(IDLE_S)
    after, seconds = cluster.traffic(), time.monotonic() - started
    return {f"host {host}": (after[host].sent.bytes - before[host].sent.bytes) / seconds for host in after}


def records(directory: Path, event: str) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    return [r for r in jsonl.latest(jsonl.read(path)) if r["event"] == event] if path.exists() else []


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
