"""What does compression bring the main job on a Ray cluster of three hosts at 100 Mbit/s?

    python benchmarks/multinode.py --data DIR [--links 100mbit 10mbit] [--epochs 1] [--rounds 2]

A natural model of launch/cifar10.yaml is trained once, on this machine. Then two runs fine-tune it through `distrobust
train --set cluster.address=...` in a lab of three hosts with a Ray node in each: dense, and with the file's
compression. For accuracy both go to their end on the first link. For time they take turns on every link, --rounds
times, --steps steps each. Bytes are those of every host's interface, packet headers and Ray's own traffic included,
between two records of the training phase; data and checkpoints are on this machine's disk and cross no link. All three
hosts share this machine's cores, so the time of computation is not that of three machines; what the link adds is.
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
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning")
    parser.add_argument("--pretrain-epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="of a run for time")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-multinode"))
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    common = [*COMMON, f"data.path={arguments.data}", f"train.epochs={arguments.epochs}"]
    natural = work / "natural/models/pre-trained.pt"
    if not natural.exists():
        pretrain(work / "natural", [*common, f"pretrain.epochs={arguments.pretrain_epochs}"], natural)
    common += ["pretrain=null", f"model.weights={natural}", f"cluster.workers={HOSTS}"]
    ways = {"dense": ["compress=null"], "compressed": []}
    first = arguments.links[0]
    accuracy = {name: whole(first, work / f"{first}-{name}", [*common, *ways[name]]) for name in ways}
    links = {link: taking_turns(link, work / link, common, ways, arguments) for link in arguments.links}
    for link, one in links.items():
        for name in ways:
            print(f"{link:>8} {name:<11} {one[name]['median_step_s']:.3f} s a step", one[name]["runs"][0]["wire"])
    config = configuration.load(FILE, [f"data.path={arguments.data.name}", f"cluster.workers={HOSTS}", *COMMON])
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
                "accuracy": accuracy,
                "links": links,
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


def whole(link: str, directory: Path, overrides: list[str]) -> dict[str, Any]:
    """A run to its end, unless it is there already; what it sent and how accurate its model is."""
    if not records(directory, "done"):
        with ray_lab(HOSTS, parse_link(link)) as cluster:
            run(cluster, directory, overrides, None)
        (directory / "commit").write_text(record.COMMIT)
    last = records(directory, "step")[-1]
    keys = ("model", "attack", "accuracy", "low", "high", "samples", "seed", "flags")
    return {
        "commit": (directory / "commit").read_text().strip(),
        "steps": last["step"],
        "transport_sent_bytes": last["sent_bytes"],
        "transport_dense_bytes": last["dense_bytes"],
        "scores": [{key: r[key] for key in keys} for r in records(directory, "evaluation")],
    }


def taking_turns(
    link: str, place: Path, common: list[str], ways: dict[str, list[str]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Short runs on one link, dense and compressed in turn; the median over all steps of a way."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with ray_lab(HOSTS, parse_link(link)) as cluster:
        for number in range(arguments.rounds):
            for name, overrides in ways.items():
                directory = place.with_name(f"{link}-{name}-{number}")
                runs[name].append(run(cluster, directory, [*common, *overrides], arguments.steps))
        alone = idle(cluster)
    result: dict[str, Any] = {"ray alone, bytes a second": alone}
    for name, some in runs.items():
        seconds = [s for one in some for s in one["step_s"]]
        result[name] = {"median_step_s": statistics.median(seconds), "least_step_s": min(seconds), "runs": some}
    return result


def run(cluster: RayLab, directory: Path, overrides: list[str], num_steps: int | None) -> dict[str, Any]:
    """One run in the lab; ended by a stop request after `num_steps`, if given. Steps are means over EVERY of them."""
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
        "step_s": [step["step_s"] for step in steps[1:]],
        "load_average": os.getloadavg()[0],
        "num_parameters": start["num_parameters"],
        "interface": start["interface"],
        "wire": {
            f"host {host}": {
                "sent_bytes_a_step": (after[host].sent.bytes - before[host].sent.bytes) / (last - first),
                "received_bytes_a_step": (after[host].received.bytes - before[host].received.bytes) / (last - first),
            }
            for host in after
        },
        "wire_measured_over_steps": [first, last],
        "density": steps[-1]["density"],
        "transport_sent_bytes": steps[-1]["sent_bytes"],
        "transport_dense_bytes": steps[-1]["dense_bytes"],
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
