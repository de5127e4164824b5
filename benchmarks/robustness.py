"""What makes an adversarial fine-tuning good: start, schedule, radius, loss, noise-adaptive rates, compression?

    python benchmarks/robustness.py run --data DIR [--seeds 0 1 2] [--only TEXT] [--work DIR]
    python benchmarks/robustness.py autoattack --data DIR [--seeds 0 1 2] [--only TEXT] [--work DIR]
    python benchmarks/robustness.py write [--work DIR]

CIFAR-10, resnet9, N-FGSM at 8/255 unless said otherwise, two real workers through torchrun, launch/cifar10.yaml dense
and with one thing changed at a time (`cells`). The natural model, eight epochs, is trained once a seed. Every schedule,
every start and noise-adaptive rates have a learning rate of their own, the best of PEAKS on seed 0: by the loss under
PGD-10 on the 1,000 held-out rows, whose accuracies differ by less than their error.

Clean accuracy on all test images; on the same 1,000, evenly spaced: PGD-20, and, for cells marked `autoattack`, once
they have run, AutoAttack standard. Cost is the time of training steps on two cores: their number times the median one,
which other work on the machine moves little; the natural model's is told apart. Runs already in the work directory are
kept, killed ones continued; `write` makes the record of what is there, and its plots.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import record
import torch
from cifar10 import train

from distrobust import data
from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.evaluation.suite import Suite
from distrobust.metrics import jsonl
from distrobust.train.evaluation import Job
from distrobust.train.evaluation_ranks import evaluate
from distrobust.train.modelfile import build_model, load_model_file
from distrobust.train.scoring import spaced_rows

IMAGES = 1000
PEAKS = (0.03, 0.1, 0.3, 0.6)
KEPT = ("accuracy", "low", "high", "samples", "seed", "flags")
AUTOATTACK = "autoattack.json"
Cell = dict[str, Any]


def cells() -> list[Cell]:
    """Name, what is changed against 3 epochs of dense fine-tuning, and which question it belongs to."""
    rows: list[Cell] = []

    def add(question: str, name: str, *changes: str, scratch: bool = False, autoattack: bool = False) -> None:
        rows.append(
            {
                "question": question,
                "name": name,
                "changes": list(changes),
                "scratch": scratch,
                "autoattack": autoattack,
            }
        )

    add("start", "fine-tuned, 3 epochs", autoattack=True)
    add("start", "from scratch, 3 epochs", scratch=True)
    add("start", "from scratch, 10 epochs", "train.epochs=10", scratch=True)
    add("start", "from scratch, 30 epochs", "train.epochs=30", scratch=True, autoattack=True)
    for name in ("slow_start_fast_decay", "cosine", "constant"):
        add("schedule", name, f"train.schedule.name={name}")
    for share in (0.0, 0.5):
        add("radius", f"eps rises over {share:.0%} of the phase", f"attack.ramp={share}")
    add("loss", "TRADES, PGD-5", "attack.name=pgd", "attack.steps=5", "attack.loss=trades")
    add("loss", "MART, PGD-5", "attack.name=pgd", "attack.steps=5", "attack.loss=mart")
    add("loss", "PGD-AT, PGD-5", "attack.name=pgd", "attack.steps=5")
    add("loss", "weight perturbation 0.005", "attack.awp=0.005")
    add("loss", "average of the weights, 0.99", "train.average=0.99")
    add("loss", "label smoothing 0.1", "train.label_smoothing=0.1")
    add("loss", "free, 4 replays, 1 epoch", "attack.name=free", "attack.replays=4", "train.epochs=1")
    add("rates", "noise-adaptive rates", "noise={}")
    # where the radius rises, held-out accuracy does too, epoch after epoch, and the accuracy gradient never cuts
    constant = ("train.schedule.name=constant", "train.epochs=6", "attack.ramp=0")
    add("rates", "constant rate and radius, 6 epochs", *constant)
    cuts = ("train.accuracy_gradient={window: 1, patience: 1, factor: 0.5}", "evaluate.held_out_images=0")
    add("rates", "constant radius, rate cut by accuracy gradient, 6 epochs", *constant, *cuts)
    for variance in (1e-2, 1e-6):  # the paper's smallest, and noise as long as the gradient
        add("rates", f"gradient noise {variance:g}", f"train.gradient_noise={variance}")
    for factor in (100, 1000):
        budget = f"{{density: auto, fewer_bytes: {factor}, step_ahead: true, final_steps: 1, final_density: 0.5}}"
        add("compression", f"{factor} times fewer bytes", f"compress={budget}", autoattack=factor == 100)
    return rows


def natural(work: Path, folder: Path, seed: int) -> Path:
    """The run whose models/pre-trained.pt all fine-tuning of this seed starts from; it goes on for one epoch itself."""
    directory = work / f"natural-{seed}"
    train(directory, [*_common(folder, seed), "compress=null", "train.epochs=1", "evaluate.images=250"])
    return directory


def _common(folder: Path, seed: int) -> list[str]:
    return [f"data.path={folder}", f"run.seed={seed}", "metrics.port=null"]


def tuned(cell: Cell) -> str:
    """What a peak is chosen for; the other cells share that of the fine-tuning as it is."""
    names = [change.partition("=")[2] for change in cell["changes"] if change.startswith("train.schedule.name")]
    return " ".join([*(names or ["one_cycle"]), *(["from scratch"] if cell["scratch"] else []), *_noise(cell)])


def _noise(cell: Cell) -> list[str]:
    return [change for change in cell["changes"] if change.startswith("noise")]


def peak(cell: Cell, work: Path, folder: Path) -> float:
    """The one of PEAKS that is best on held-out rows after 3 epochs on seed 0."""
    schedule = [change for change in cell["changes"] if change.startswith("train.schedule")]
    found: dict[float, float] = {}
    for value in PEAKS:
        directory = work / f"tuning {tuned(cell)} {value}"
        changes = [*schedule, *_noise(cell), f"train.schedule.peak={value}", "evaluate.test=false"]
        train(directory, [*_start(cell, work, folder, 0), *changes])
        result = directory / "loss.json"
        if not result.exists():
            result.write_text(json.dumps(held_out_loss(directory / "models/fine-tuned.pt", folder)))
        found[value] = json.loads(result.read_text())
    return min(found, key=lambda value: found[value])


def held_out_loss(model: Path, folder: Path) -> float:
    """Cross-entropy under PGD-10 on the rows that no run of seed 0 trains on."""
    source = data.describe(folder, "train")
    _, rows = data.split_held_out(source, 0.02, 0)
    net = build_model("resnet9", source, seed=0).to(memory_format=torch.channels_last).eval()
    load_model_file(net, model)
    total, num_images = 0.0, 0
    for number, (images, labels) in enumerate(spaced_rows(data.Shard(source, 0, 1, 0, rows=rows), 0, 250)):
        x = images.float().div(255).contiguous(memory_format=torch.channels_last)
        attack, generator = Attack("pgd", steps=10), torch.Generator().manual_seed(number)
        with torch.no_grad():
            logits = net(attack(net, x, labels, Threat("linf", 8 / 255), generator))
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        num_images += len(labels)
    return total / num_images


def _start(cell: Cell, work: Path, folder: Path, seed: int) -> list[str]:
    start = [] if cell["scratch"] else [f"model.weights={natural(work, folder, seed) / 'models/pre-trained.pt'}"]
    return [*_common(folder, seed), "compress=null", "pretrain=null", "evaluate.held_out_images=250", *start]


def directory_of(cell: Cell, work: Path, seed: int) -> Path:
    """The directory of its run."""
    return work / f"{cell['name']}, seed {seed}".replace("/", " ")


def run(cell: Cell, work: Path, folder: Path, seed: int) -> None:
    """Trains and scores one cell."""
    directory = directory_of(cell, work, seed)
    result = directory / "result.json"
    if result.exists():
        return
    value = peak(cell, work, folder)
    overrides = [f"train.schedule.peak={value}", f"evaluate.images={IMAGES}", *cell["changes"]]
    train(directory, [*_start(cell, work, folder, seed), *overrides])
    records = jsonl.latest(jsonl.read(directory / "metrics.jsonl"))
    steps = [r for r in records if r["event"] == "step"]
    scores = {
        r["attack"]: {key: r[key] for key in KEPT}
        for r in records
        if r["event"] == "evaluation" and r["model"] == "fine-tuned"
    }
    content = {
        "cell": cell,
        "seed": seed,
        "peak": value,
        "minutes": minutes(steps),
        "sent_bytes": steps[-1]["sent_bytes"],
        "dense_bytes": steps[-1]["dense_bytes"],
        "scores": scores,
        "commit": record.COMMIT,
    }
    result.write_text(json.dumps(content))


def minutes(steps: list[Any]) -> float:
    """Of training steps: their number times the median of those recorded, each the mean of some."""
    return float(statistics.median(r["step_s"] for r in steps) * steps[-1]["step"] / 60)


def autoattack(cell: Cell, work: Path, folder: Path, seed: int) -> None:
    """Its verdict over all its parts on the run's model, on the images of PGD-20, beside the run's result."""
    directory = directory_of(cell, work, seed)
    result = directory / AUTOATTACK
    if result.exists():
        return
    suite = Suite(Threat("linf", 8 / 255), ("autoattack",), checks=False)
    model, out = directory / "models/fine-tuned.pt", directory / "evaluation"
    found = evaluate(Job(model, folder, suite, out, images=IMAGES, batch=100, seed=seed, threads=1), workers=2)
    assert found is not None
    score = found["results"][-1]["score"]
    result.write_text(json.dumps({"AutoAttack": {key: score[key] for key in KEPT}}))


def write(work: Path) -> Path:
    """The record of the results in `work`, with the natural model's cost."""
    found = [json.loads(path.read_text()) for path in sorted(work.glob("*/result.json"))]
    for entry in found:
        path = directory_of(entry["cell"], work, entry["seed"]) / AUTOATTACK
        entry["scores"] |= json.loads(path.read_text()) if path.exists() else {}
    rows = []
    for cell in cells():
        runs = [r for r in found if r["cell"]["name"] == cell["name"]]
        if not runs:
            continue
        attacks = dict.fromkeys(attack for r in runs for attack in r["scores"])
        rows.append(
            {
                **cell,
                "peak": runs[0]["peak"],
                "scores": {
                    a: record.interval([r["scores"][a]["accuracy"] for r in runs if a in r["scores"]]) for a in attacks
                },
                "train_minutes": record.interval([r["minutes"] for r in runs]),
                "fewer_bytes": record.interval([r["dense_bytes"] / r["sent_bytes"] for r in runs]),
                "runs": runs,
            }
        )
    pretraining = [
        minutes([r for r in jsonl.read(path) if r["event"] == "step" and r["phase"] == "pretrain"])
        for path in sorted(work.glob("natural-*/metrics.jsonl"))
    ]
    content = {
        "setting": __doc__,
        "intervals": "95 %, Student's t over seeds",
        "pretrain_minutes": record.interval(pretraining),
        "rows": rows,
    }
    path = record.write("robustness", (__doc__ or "").splitlines()[0], content)
    draw(rows, path.with_suffix(".svg"))
    return path


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One page: clean against robust accuracy, a panel a question, every point with its intervals."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    questions = list(dict.fromkeys(row["question"] for row in rows))
    figure, axes = plt.subplots(len(questions), 1, figsize=(8, 3.6 * len(questions)), squeeze=False)
    base = next((row for row in rows if row["name"] == "fine-tuned, 3 epochs"), None)
    for question, axis in zip(questions, axes[:, 0], strict=True):
        chosen = [row for row in rows if row["question"] == question or row is base]
        for row in chosen:
            clean, robust = (next(v for k, v in row["scores"].items() if word in k) for word in ("clean", "PGD-20"))
            bars = {"xerr": 100 * (clean["half_width_95"] or 0), "yerr": 100 * (robust["half_width_95"] or 0)}
            place = (100 * clean["mean"], 100 * robust["mean"])
            axis.errorbar(*place, **bars, marker="o", capsize=3, color="black" if row is base else "tab:red")
            axis.annotate(row["name"], place, fontsize=7, xytext=(4, 4), textcoords="offset points")
        axis.set_title(question, fontsize=10)
        axis.set_xlabel("clean accuracy, %")
        axis.set_ylabel("PGD-20 8/255, %")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "autoattack", "write", "cells"])
    parser.add_argument("--data", type=Path, help="directory with train.parquet and test.parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-robustness"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="cells whose question or name contains this")
    arguments = parser.parse_args()
    chosen = [c for c in cells() if arguments.only in f"{c['question']}: {c['name']}"]
    if arguments.what == "cells":
        print("\n".join(f"{c['question']}: {c['name']}" for c in chosen))
    elif arguments.what == "write":
        print(write(arguments.work))
    else:
        if arguments.data is None:
            parser.error(f"{arguments.what} needs --data")
        for seed, cell in itertools.product(arguments.seeds, chosen):
            if arguments.what == "run" or cell["autoattack"]:
                print(f"{cell['name']}, seed {seed}", flush=True)
                action = run if arguments.what == "run" else autoattack
                action(cell, arguments.work.absolute(), arguments.data.absolute(), seed)


if __name__ == "__main__":
    main()
