"""How much accuracy and robustness does compression cost on CIFAR-10, at how many fewer bytes?

    python benchmarks/cifar10.py --data DIR [--seeds 0 1 2] [--work DIR]

For every seed: launch/cifar10.yaml with dense fine-tuning, then the same fine-tuning, from the same natural model,
with the file's compression. Two workers through torchrun. Clean accuracy on all test images, our PGD-20 on 2,000 and
foolbox's on 1,000 of them, evenly spaced (in the record of 2026-11-21: the first ones). Finished runs in the work
directory are continued, not repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import record

from distrobust import config as configuration
from distrobust.adversarial.threat import Threat
from distrobust.evaluation.suite import Suite
from distrobust.metrics import jsonl
from distrobust.train.evaluation import Job
from distrobust.train.evaluation_ranks import evaluate

ROOT = Path(__file__).parent.parent
FILE = ROOT / "launch/cifar10.yaml"
FOOLBOX_IMAGES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with train.parquet and test.parquet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-cifar10"))
    parser.add_argument("--name", default="cifar10", help="of the record")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="override for both variants")
    arguments = parser.parse_args()

    runs: dict[str, list[dict[str, Any]]] = {"dense": [], "compressed": []}
    for seed in arguments.seeds:
        common = [f"data.path={arguments.data}", f"run.seed={seed}", "metrics.port=null", *arguments.overrides]
        dense, compressed = arguments.work / f"dense-{seed}", arguments.work / f"compressed-{seed}"
        train(dense, [*common, "compress=null"])
        train(compressed, [*common, "pretrain=null", f"model.weights={dense / 'models/pre-trained.pt'}"])
        runs["dense"].append(measure(dense, arguments.data, seed))
        runs["compressed"].append(measure(compressed, arguments.data, seed))

    config = configuration.load(FILE, [f"data.path={arguments.data.name}", *arguments.overrides])
    path = record.write(
        arguments.name,
        "How much accuracy and robustness does compression cost on CIFAR-10, at how many fewer bytes?",
        {
            "configuration": config.model_dump(mode="json"),
            "seeds": arguments.seeds,
            "intervals": "95 %, Student's t over seeds",
            "summary": {name: summary(rows) for name, rows in runs.items()},
            "runs": runs,
        },
    )
    print(path)


def train(directory: Path, overrides: list[str]) -> None:
    outcome = directory / "outcome.json"
    if outcome.exists() and '"done"' in outcome.read_text():
        return
    options = [part for override in [*overrides, f"run.dir={directory}"] for part in ("--set", override)]
    command = [sys.executable, "-m", "distrobust", "train", str(FILE), "--launcher", "torchrun", *options]
    subprocess.run(command, check=True)


def measure(directory: Path, data: Path, seed: int) -> dict[str, Any]:
    records = jsonl.latest(jsonl.read(directory / "metrics.jsonl"))
    steps = [r for r in records if r["event"] == "step" and r["phase"] == "train"]
    result: dict[str, Any] = {
        "seed": seed,
        "sent_bytes": steps[-1]["sent_bytes"],
        "dense_bytes": steps[-1]["dense_bytes"],
        "skipped_steps": steps[-1]["nonfinite_steps"],
        "seconds_per_step": sum(r["step_s"] for r in steps) / len(steps),
        "scores": [
            {key: r[key] for key in ("model", "attack", "accuracy", "low", "high", "samples", "seed", "flags")}
            for r in records
            if r["event"] == "evaluation"
        ],
    }
    model, suite = directory / "models/fine-tuned.pt", Suite(Threat("linf", 8 / 255), ("foolbox",), steps=20)
    job = Job(model, data, suite, directory / "evaluation", images=FOOLBOX_IMAGES, batch=250, seed=seed, threads=2)
    evaluation = evaluate(job)
    assert evaluation is not None
    second = evaluation["results"][-1]["score"]
    result["scores"].append(
        {"model": "fine-tuned"}
        | {key: second[key] for key in ("attack", "accuracy", "low", "high", "samples", "seed", "flags")}
    )
    return result


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = {(score["model"], score["attack"]): None for row in rows for score in row["scores"]}
    accuracies = {
        f"{model}, {attack}": record.interval(
            [
                score["accuracy"]
                for row in rows
                for score in row["scores"]
                if (score["model"], score["attack"]) == (model, attack)
            ]
        )
        for model, attack in names
    }
    return {
        **accuracies,
        "fewer_bytes": record.interval([row["dense_bytes"] / row["sent_bytes"] for row in rows]),
        "seconds_per_step": record.interval([row["seconds_per_step"] for row in rows]),
    }


if __name__ == "__main__":
    main()
