"""How much clean and robust accuracy does each way of sending fewer bytes cost, in short runs on CIFAR-10?

    python benchmarks/accuracy.py cells                                     # what there is to run
    python benchmarks/accuracy.py run --data DIR --natural DIR [--only TEXT] [--seeds 0 1 2] [--work DIR]
    python benchmarks/accuracy.py write [--work DIR]                        # the record, from all finished cells

The 9-layer residual network; N workers inside one process (workers.py); the same global batch of 256 whatever N is. A
cell is fine-tuning of a natural model (--natural DIR holds SEED.pt, as `distrobust train` writes models) against N-FGSM
or PGD-7 examples, or natural training from scratch. Bytes are those of the whole run, warm-up and last steps included,
counted at the transport, for one worker, against an fp32 ring all-reduce. Clean accuracy on all test images, PGD-20 on
2,000. What the record holds already is not run again and stays in it, so the table can be filled in over days and
machines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import peers_in_process
import record
import torch
from workers import Workers

from distrobust import data
from distrobust.adversarial import losses
from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.folded import Folded
from distrobust.adversarial.threat import Threat
from distrobust.compression.memory import Rule
from distrobust.evaluation.accuracy import score
from distrobust.evaluation.counting import count_correct
from distrobust.optim.schedules import Schedule, ramp
from distrobust.train.modelfile import build_model, load_model_file
from distrobust.train.randomness import generator_at
from distrobust.train.scoring import spaced_rows

GLOBAL_BATCH, EPS, ATTACKED = 256, 8 / 255, 2000
# task: start, attack, peak rate, epochs by default
TASKS: dict[str, tuple[str, Attack | None, float]] = {
    "n_fgsm": ("natural", Attack("n_fgsm"), 0.3),
    "pgd7": ("natural", Attack("pgd", steps=7), 0.3),
    "natural": ("scratch", None, 0.4),
}
DGC: dict[str, Any] = {"warmup": 0.2}
KEPT = (
    "seed",
    "clean",
    "pgd20",
    "flags",
    "sent_bytes",
    "dense_bytes",
    "density",
    "own_share",
    "train_minutes",
    "commit",
)
AHEAD: dict[str, Any] = {"step_ahead": True, "masking": False, "final_steps": 1, "final_density": 0.5}


def cells() -> list[dict[str, Any]]:
    """Name, task, epochs, workers and options of everything there is to run, without seeds."""
    rows: list[dict[str, Any]] = []

    def add(method: str, task: str = "n_fgsm", epochs: int = 3, workers: int = 4, **options: Any) -> None:
        rows.append({"method": method, "task": task, "epochs": epochs, "workers": workers, **options})

    def auto(factor: float, values: str = "4bit", **options: Any) -> dict[str, Any]:
        return {"density": "auto", "fewer_bytes": factor, "values": values, **AHEAD, **options}

    for epochs in (10, 3):
        add("dense", epochs=epochs, workers=2)
        add("auto 100x", epochs=epochs, workers=2, **auto(100))
    for factor in (30, 300, 1000):
        add(f"auto {factor}x", workers=2, **auto(factor))
    for values in ("fp16", "2bit", "sign"):
        add(f"auto 100x {values}", workers=2, **auto(100, values))
    for density in (0.05, 0.01, 0.001):
        add(f"DGC {density:.1%} fp16", workers=2, density=density, **DGC)
    for values in ("4bit", "2bit"):
        add(f"DGC 1.0% {values}", "natural", 4, density=0.01, values=values, **DGC)
    one = {"density": 0.01, "values": "fp16"}
    add("1.0% no momentum correction", "natural", 4, momentum="optimizer", masking=False, **one, **DGC)
    add("1.0% no masking", "natural", 4, masking=False, **one, **DGC)
    add("1.0% no warm-up", "natural", 4, **one)
    add("1.0% no residual", "natural", 4, residual=False, **one, **DGC)
    add("1.0% step-ahead, no masking, no warm-up", "natural", 4, **one, step_ahead=True, masking=False)
    add("step-ahead 1.0% 4bit, warm-up", "natural", 4, density=0.01, values="4bit", **AHEAD, **DGC)
    add("step-ahead 0.1% 4bit, warm-up", "natural", 4, density=0.001, values="4bit", **AHEAD, **DGC)
    for workers in (4, 8, 16, 32):
        for task, epochs in (("natural", 4), ("n_fgsm", 1)):
            add("dense", task, epochs, workers)
            # every density, and plain DGC, at 4 workers; the paper's 1 % and 0.1 % at more
            for density in (0.05, 0.01, 0.001) if workers == 4 else (0.01, 0.001):
                kept = {"density": density, "values": "4bit", **AHEAD}
                if workers == 4:
                    add(f"DGC {density:.1%} fp16", task, epochs, workers, density=density, **DGC)
                if workers == 4 or task == "n_fgsm":
                    add(f"step-ahead {density:.1%} 4bit", task, epochs, workers, **kept)
                else:  # from scratch it needs the ladder: see the rows of 4 workers
                    add(f"step-ahead {density:.1%} 4bit, warm-up", task, epochs, workers, **kept, **DGC)
    for workers, shares in ((8, (0.125, 0.5)), (32, (0.03125, 0.125))):  # comm/ahead.py takes 2 / workers
        for share in shares:
            kept = {"density": 0.01, "values": "4bit", **AHEAD, "share": share}
            add(f"step-ahead by {share:g} 1.0% 4bit", "n_fgsm", 1, workers, **kept)
    for method, options in (("dense", {}), ("auto 100x", auto(100))):
        add(method, "pgd7", 1, 2, **options)
    for rank in (1, 4):
        add(f"PowerSGD rank {rank}", workers=2, peer="powersgd", rank=rank)
    for every in (16, 64):
        add(f"local steps, average every {every}", workers=2, peer="local", every=every)
    add("16-bit all-reduce", workers=2, peer="fp16")
    return rows


def name_of(cell: dict[str, Any]) -> str:
    return f"{cell['task']}, {cell['epochs']} epochs, {cell['workers']} workers: {cell['method']}"


def run(cell: dict[str, Any], seed: int, folder: Path, natural: Path) -> dict[str, Any]:
    """Trains and scores one cell."""
    started = time.perf_counter()
    start, attack, peak = TASKS[cell["task"]]
    num_workers, epochs = cell["workers"], cell["epochs"]
    source = data.describe(folder, "train")
    shard = data.Shard(source, 0, 1, seed)
    num_steps = epochs * shard.num_steps(GLOBAL_BATCH)
    net = build_model("resnet9", source, seed=seed)
    if start == "natural":
        load_model_file(net, natural / f"{seed}.pt")
    net.to(memory_format=torch.channels_last)
    net.train()
    schedule = Schedule("one_cycle", peak, 0.2)
    options = options_of(cell)
    kept = options.pop("momentum", "residual") == "residual"
    rule = Rule(momentum=0.9 if kept else 0.0, weight_decay=5e-4, masking=options.pop("masking", True))
    made = peers_in_process.make if "peer" in options else Workers
    workers = made(net, num_workers, num_steps, rule, **options)
    attacked = Folded(net, torch.rand(2, *source.shape)) if attack is not None else None
    outer = [torch.zeros_like(p) for p in net.parameters()]  # momentum in the optimizer: the ablation
    losses_seen = []
    share: float | None = None
    step = 0
    for epoch in range(epochs):
        for images, labels in shard.batches(epoch, GLOBAL_BATCH):
            progress = step / num_steps
            threat = Threat("linf", EPS * ramp(progress, 0.95))
            total = 0.0

            def backward(
                rank: int, step: int = step, images: Any = images, labels: Any = labels, threat: Any = threat
            ) -> None:
                nonlocal total
                total += train_on(net, attacked, images, labels, attack, threat, seed, step, rank, num_workers)

            if step == num_steps // 2 and isinstance(workers, Workers):
                share = workers.own_share()
            workers.step(backward, schedule.at(progress), outer if not kept else None)
            losses_seen.append(total / num_workers)
            step += 1
    workers.average_buffers()
    net.eval()
    result = {
        "cell": cell,
        "name": name_of(cell),
        "seed": seed,
        **workers.bytes(),
        "loss": losses_seen[-50:],
        "own_share": share,
    }
    result["train_minutes"] = (time.perf_counter() - started) / 60
    return {**result, **evaluate(net, folder, seed, robust=attack is not None), "commit": record.COMMIT}


def train_on(
    net: Any,
    attacked: Folded | None,
    images: Any,
    labels: Any,
    attack: Any,
    threat: Any,
    seed: int,
    step: int,
    rank: int,
    num_workers: int,
) -> float:
    """Forward and backward of one worker's share of the batch; its mean loss. attacked: `net` for attacks."""
    generator = generator_at(images.device, seed, 1, step, rank)
    mine = slice(rank, None, num_workers)
    x = data.crop_and_flip(images[mine], generator, pad=4, flip=True).float().div_(255)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        if attacked is None:
            output = losses.Natural()(net, net, x, labels[mine])
        else:
            output = losses.PGDAT()(net, attacked.current(), x, labels[mine], attack, threat, generator)
    output.loss.backward()
    return float(output.loss.detach())


def evaluate(net: Any, folder: Path, seed: int, robust: bool) -> dict[str, Any]:
    shard = data.Shard(data.describe(folder, "test"), 0, 1, seed=0)
    clean = score(count_correct(net, spaced_rows(shard, 0, 250), None, None, seed), None, None, seed)
    result: dict[str, Any] = {"clean": clean.accuracy}
    if robust:
        attack, threat = Attack("pgd", steps=20), Threat("linf", EPS)
        rows = spaced_rows(shard, ATTACKED, 250)
        robustness = score(
            count_correct(net, rows, attack, threat, seed, indices=itertools.count()), attack, threat, seed
        )
        result |= {"pgd20": robustness.accuracy, "flags": list(robustness.flags)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cells", "run", "write"])
    parser.add_argument("--data", type=Path, help="directory with train.parquet and test.parquet")
    parser.add_argument("--natural", type=Path, help="directory with SEED.pt")
    parser.add_argument("--only", default="", help="cells whose name contains this; several separated by |")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-accuracy"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = [c for c in cells() if any(text in name_of(c) for text in arguments.only.split("|"))]
    if arguments.what == "cells":
        print("\n".join(name_of(cell) for cell in chosen))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.what == "write":
        print(write(arguments.work))
        return
    known = recorded()
    for seed, cell in itertools.product(arguments.seeds, chosen):
        if (name_of(cell), seed) in known:
            continue
        path = arguments.work / f"{name_of(cell)}, seed {seed}.json".replace("/", " ")
        try:
            path.touch(exist_ok=False)  # so that two of these share the work
        except FileExistsError:
            if not path.stat().st_size:
                print(
                    f"{path.name}: under way elsewhere, or was killed there; to repeat it remove the file", flush=True
                )
            continue
        try:
            result = run(cell, seed, arguments.data, arguments.natural)
        except BaseException:
            path.unlink()
            raise
        path.write_text(json.dumps(result))
        print({key: result[key] for key in result if key not in ("cell", "loss", "commit", "flags")}, flush=True)


def options_of(cell: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cell.items() if key not in ("method", "task", "epochs", "workers")}


def recorded() -> dict[tuple[str, int], dict[str, Any]]:
    """The runs of the record as it stands, by name and seed; not those made with other options than now."""
    path = record.RESULTS / "accuracy.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    now = {name_of(cell): options_of(cell) for cell in cells()}
    kept = [row for row in rows if row["options"] == now.get(row["name"])]
    return {(row["name"], run["seed"]): run for row in kept for run in row["runs"]}


def write(work: Path) -> Path:
    """The record: every finished run of `cells`, in the record so far and in `work`, with intervals over seeds."""
    runs = recorded()
    for path in work.glob("*.json"):
        if path.stat().st_size:
            result = json.loads(path.read_text())
            runs[result["name"], result["seed"]] = {key: result[key] for key in KEPT if key in result}
    rows = []
    for cell in cells():
        mine = [run for (name, _), run in sorted(runs.items()) if name == name_of(cell)]
        if not mine:
            continue
        row: dict[str, Any] = {key: cell[key] for key in ("method", "task", "epochs", "workers")}
        row = {"name": name_of(cell), **row, "options": options_of(cell)}
        for key in ("clean", "pgd20"):
            if key in mine[0]:
                row[key] = record.interval([run[key] for run in mine])
        row["fewer_bytes"] = mine[0]["dense_bytes"] / mine[0]["sent_bytes"]
        rows.append({**row, "runs": mine})
    content = {
        "setting": __doc__,
        "intervals": "95 %, Student's t over seeds; none for one seed",
        "not_run": [name_of(cell) for cell in cells() if not any(name == name_of(cell) for name, _ in runs)],
        "rows": rows,
    }
    return record.write("accuracy", "How much accuracy does each way of sending fewer bytes cost?", content)


if __name__ == "__main__":
    main()
