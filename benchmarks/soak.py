"""Does a run on a Ray cluster survive twenty minutes of random faults, and end where it would have ended without them?

    python benchmarks/soak.py [--minutes 21] [--seed 0]

scikit-learn's digits, three workers in a lab of three Ray nodes at 100 Mbit/s, elastic down to two. Two kinds of
faults, both drawn from the seed: some are planned for a rank and step (a worker killed in the forward pass, in the
hook, while it writes a checkpoint; one that hangs; a full disk; a failing upload), others come every 45 to 75 seconds
from outside (a link cut for a few seconds, a node that fails and is replaced, the head killed with the driver and both
started again, the newest checkpoint damaged before a worker is killed). After the given time no more come from outside
and the run goes to its end. Replicas are compared at every tenth step and every checkpoint. What it ends with is
compared with the same job without faults.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import yaml

from distrobust.cluster.lab import HEAD, Command, RayLab, ray_lab
from distrobust.data import write_digits
from distrobust.lab.link import Link
from distrobust.metrics import jsonl

TRAIN = [sys.executable, "-m", "distrobust", "train"]
TIMEOUT_S = 20.0  # of a collective
LIMIT_S = 240.0  # without a step, whatever happened: more is a hang
PLANNED = ("kill_in_forward", "kill_in_hook", "kill_in_checkpoint", "hang", "disk_full", "upload_fails")
OF_STORAGE = ("disk_full", "upload_fails")
OUTSIDE = ("cut", "replace a node", "kill the head", "damage a checkpoint")
PACE_S = 0.5  # a step takes at least that long, or the run would be over before the faults


class Soak:
    """The cluster, the run and what has happened to them."""

    def __init__(self, stack: contextlib.ExitStack, job: Path, run: Path, draw: random.Random) -> None:
        self.stack, self.job, self.run, self.draw = stack, job, run, draw
        self.events: list[dict[str, Any]] = []
        self.driver_starts = 0
        self.start_cluster()

    def start_cluster(self) -> None:
        self.cluster: RayLab = self.stack.enter_context(ray_lab(3, Link(100e6)))
        self.cluster.environment["DISTROBUST_FAULTS"] = "allow"
        self.start_driver()

    def start_driver(self) -> None:
        self.driver_starts += 1
        options = ["--set", f"cluster.address={self.cluster.address}"]
        log = self.stack.enter_context((self.job.parent / "driver.log").open("ab"))
        self.driver: Command = self.cluster.start([*TRAIN, str(self.job), *options], stdout=log, stderr=log)

    def records(self, event: str) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        return [r for r in jsonl.read(path) if r["event"] == event] if path.exists() else []

    def wait_for_step_after(self, since: float) -> float:
        """Seconds from `since` to the next record of a step; starts a driver that gave up again, as job managers do."""
        while not any(r["time"] > since for r in self.records("step")[-1:]):
            if time.time() - since > LIMIT_S:
                sys.exit(f"no step for {LIMIT_S:.0f} s after {self.events[-1:]}; see {self.job.parent}")
            self.keep_driver()
            time.sleep(0.2)
        return time.time() - since

    def keep_driver(self) -> bool:
        """False if the run is complete."""
        code = self.driver.process.poll()
        if code == 0:
            return False
        if code is not None:
            self.events.append({"event": "driver ended", "code": code, "step": self.step()})
            self.start_driver()
        return True

    def step(self) -> int:
        steps = self.records("step")
        return int(steps[-1]["step"]) if steps else 0

    def strike(self) -> None:
        """One fault from outside."""
        kind = self.draw.choice(OUTSIDE)
        entry: dict[str, Any] = {"event": kind, "step": self.step()}
        self.events.append(entry)
        began = time.time()
        node = self.draw.choice([number for number in self.cluster.switch.hosts if number != HEAD])
        if kind == "cut":
            entry["seconds"] = self.draw.uniform(1.0, 5.0)
            self.cluster.switch.cut(node)
            time.sleep(entry["seconds"])
            self.cluster.switch.restore(node)
        elif kind == "replace a node":
            self.cluster.remove(node)
            self.cluster.add()
        elif kind == "kill the head":
            for number in list(self.cluster.switch.hosts):
                self.cluster.remove(number)
            self.start_cluster()
        else:
            self._damage_a_checkpoint(entry)
            self.cluster.remove(node)
            self.cluster.add()
        struck = time.time()
        self.wait_for_step_after(struck)
        entry["seconds_until_the_next_step"] = self.records("step")[-1]["time"] - began

    def _damage_a_checkpoint(self, entry: dict[str, Any]) -> None:
        newest = sorted((self.run / "checkpoints").glob("[0-9]-*"))[-1]
        file = self.draw.choice(sorted(newest.glob("*.pt")))
        entry["file"] = f"{newest.name}/{file.name}"
        with contextlib.suppress(FileNotFoundError):  # it was old, and is gone
            content = bytearray(file.read_bytes())
            content[self.draw.randrange(len(content))] ^= 1
            file.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=21.0, help="of faults from outside")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--planned", type=int, default=8, help="faults at a rank and step")
    parser.add_argument("--work", type=Path, default=Path("runs/soak"))
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True)
    draw = random.Random(arguments.seed)
    write_digits(work / "digits")
    planned = plan(draw, arguments.planned, arguments.epochs * 26)
    job = write_job(work, arguments.epochs, planned)
    began = time.time()
    with contextlib.ExitStack() as stack:
        stack.callback(signal.alarm, 0)
        soak = Soak(stack, job, work / "run", draw)
        soak.wait_for_step_after(began)
        while time.time() - began < 60 * arguments.minutes:
            if not soak.keep_driver():
                sys.exit("the run was complete before the time was over: raise --epochs")
            soak.strike()
            print(f"{time.time() - began:6.0f} s, step {soak.step()}: {soak.events[-1]}", flush=True)
            pause(soak, draw.uniform(45.0, 75.0))
        under_faults_s = time.time() - began
        while soak.keep_driver():
            last = soak.records("step")[-1]["time"]
            if soak.step() < arguments.epochs * 26 and time.time() - last > LIMIT_S:
                sys.exit(f"no step for {LIMIT_S:.0f} s; see {work}")
            time.sleep(1.0)
    reference = ["--launcher", "torchrun", "--set", f"run.dir={work / 'whole'}", "--set", "faults=[]"]
    subprocess.run([*TRAIN, str(job), *reference, "--set", "cluster.min_workers=null"], check=True)
    write_record(arguments, soak, planned, under_faults_s, time.time() - began, work)


def pause(soak: Soak, seconds: float) -> None:
    until = time.time() + seconds
    while time.time() < until and soak.keep_driver():
        last = soak.records("step")[-1]["time"]
        if time.time() - last > LIMIT_S:
            sys.exit(f"no step for {LIMIT_S:.0f} s; see {soak.job.parent}")
        time.sleep(0.5)


def plan(draw: random.Random, number: int, num_steps: int) -> list[dict[str, Any]]:
    """Ranks 0 and 1 only: a third is not always there. Every kind once, then at random."""
    kinds = [*PLANNED, *(draw.choice(PLANNED) for _ in range(number))][:number]
    draw.shuffle(kinds)
    places = sorted(draw.sample(range(num_steps // 20, num_steps * 9 // 10), number))
    faults = [
        {
            "kind": kind,
            "rank": draw.randrange(2),
            "step": step,
            "times": draw.randint(1, 4) if kind in OF_STORAGE else 1,
        }
        for kind, step in zip(kinds, places, strict=True)
    ]
    return [*faults, {"kind": "slow", "rank": 0, "step": 0, "seconds": PACE_S, "times": num_steps * 24 // 25}]


def write_job(work: Path, epochs: int, planned: list[dict[str, Any]]) -> Path:
    values = {
        "run": {"dir": str(work / "run")},
        "cluster": {
            "workers": 3,
            "min_workers": 2,
            "resize_every_s": 5.0,
            "timeout_s": TIMEOUT_S,
            "max_failures": 1000,
            "slow_ratio": None,
        },
        "data": {"path": str(work / "digits"), "held_out": 0.1},
        "model": {"name": "cnn"},
        "train": {"epochs": epochs, "batch_size": 48, "schedule": {"name": "one_cycle", "peak": 0.05}},
        "attack": {"name": "pgd", "steps": 3, "norm": "linf", "eps": 0.1, "ramp": 0.3},
        "compress": {"density": 0.02},
        "checkpoint": {"every": 26, "backoff_s": 0.5},
        "metrics": {"every": 10, "port": None},
        "faults": planned,
    }
    path = work / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_record(
    arguments: argparse.Namespace,
    soak: Soak,
    planned: list[dict[str, Any]],
    under_faults_s: float,
    total_s: float,
    work: Path,
) -> None:
    starts, steps = soak.records("run"), soak.records("step")
    lost = []
    for start in starts[1:]:
        before = [r["step"] for r in steps if r["time"] < start["time"]]
        lost.append((before[-1] if before else 0) - start["resumed_step"])
    waits = [e["seconds_until_the_next_step"] for e in soak.events if "seconds_until_the_next_step" in e]
    struck = sorted(int(path.name) for path in (work / "run/faults").iterdir())
    ends = {name: ending(work / name) for name in ("run", "whole")}
    print(
        record.write(
            "soak",
            (__doc__ or "").splitlines()[0],
            {
                "setting": (__doc__ or "").split("\n\n")[2],
                "seed": arguments.seed,
                "minutes_of_faults": under_faults_s / 60,
                "minutes_in_all": total_s / 60,
                "planned_faults_that_struck": [planned[number] for number in struck],
                "planned_faults_that_did_not": [f for n, f in enumerate(planned) if n not in struck],
                "events": soak.events,
                "driver_starts": soak.driver_starts,
                "starts": [{key: r[key] for key in ("world_size", "resumed_step")} for r in starts],
                "steps_done_again": {"sum": sum(lost), "most": max(lost, default=0), "of": steps[-1]["step"]},
                "seconds_until_the_next_step": {"median": statistics.median(waits), "most": max(waits)},
                "ranks_whose_parameters_differed": len(soak.records("diverged")),
                "checkpoints_not_written": len(soak.records("checkpoint_failed")),
                "notices": [r["text"] for r in soak.records("notice")],
                "end_with_faults": ends["run"],
                "end_without_faults": ends["whole"],
            },
        )
    )


def ending(run: Path) -> dict[str, Any]:
    """Loss over the last 200 steps, with its spread over records, and the evaluation."""
    every = jsonl.latest(jsonl.read(run / "metrics.jsonl"))
    losses = [r["loss"] for r in every if r["event"] == "step"][-20:]
    keys = ("attack", "accuracy", "low", "high", "samples", "seed", "flags")
    return {
        "loss": statistics.fmean(losses),
        "loss_deviation_between_records": statistics.stdev(losses),
        "scores": [{key: r[key] for key in keys} for r in every if r["event"] == "evaluation"],
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
