"""What does compression cost a federated model, whom do personal models help, and what does robustness cost?

    python benchmarks/federated.py compression|personal|robust digits|cifar10 [--data DIR] [--seeds 3]

100 clients with Dirichlet 0.1 or 1.0 class shares, 10 a round, links of 20 Mbit/s down and 5 up (medians, log-normal).
--data: directory with CIFAR-10 as Parquet; digits are made. Every simulation is one of `distrobust simulate`.

compression  accuracy against MB (both directions, all clients) and against simulated time, for each method
personal     accuracy on the clients' own test rows: local training alone, FedAvg, FTFA, RTFA
robust       clean and PGD-20 accuracy of natural and adversarial local training, dense and compressed
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import record
import torch

from distrobust import data, models
from distrobust.federated import dataset, personal, settings
from distrobust.federated.simulate import Simulation

CODED = {"density": 0.01, "values": "4bit"}
TERNARY = {"density": 0.01, "values": "sign", "indices": "rice", "fuse_below": 10**9}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "upload 1 %": {"upload": CODED},
    "upload 1 %, no residual": {"upload": {**CODED, "residual": False}},
    "both 1 %": {"upload": CODED, "download": CODED},
    "both 5 %": {"upload": {**CODED, "density": 0.05}, "download": {**CODED, "density": 0.05}},
    "sparse ternary both 1 %": {"upload": TERNARY, "download": TERNARY},
    "DGC: momentum 0.9 in the clients' residuals, both 1 %": {"upload": {**CODED, "momentum": 0.9}, "download": CODED},
    "momentum 0.9 on the server, both 1 %": {
        "upload": CODED,
        "download": CODED,
        "server": {"optimizer": "momentum", "momentum": 0.9, "rate": 0.3},
    },
}
ATTACKS: dict[str, dict[str, Any]] = {"digits": {"eps": 0.1, "steps": 5}, "cifar10": {"eps": 8 / 255, "steps": 5}}
TASKS: dict[str, dict[str, Any]] = {  # clients draw their rows: digits are too few to share out
    "digits": {"clients": {"rows": 64}, "local": {"batch_size": 16, "rate": 0.1}, "rounds": {"number": 150}},
    "cifar10": {"clients": {"rows": 128}, "local": {"batch_size": 32, "rate": 0.05}, "rounds": {"number": 30}},
}
LEFT_OUT = {"digits": (), "cifar10": ("upload 1 %, no residual", "momentum 0.9 on the server, both 1 %")}  # for time
ALPHAS = (0.1, 1.0)
LOCAL_EPOCHS = 10  # of a client that trains by itself, from the initial model
PERSONAL_ROUNDS = 40
LOOKED_AT = 40  # clients whose personal models are made


@functools.cache
def loaded(task: str, path: Path, seed: int) -> tuple[dataset.Dataset, dataset.Rows]:
    """Decoded once: training rows, held-out rows of that seed; and the test rows."""
    config = settings.parse({"data": {"path": str(path)}, "run": {"seed": seed}}, task)
    found = dataset.load(config)
    return found, dataset.load_test(config, found.source)


def simulation(task: str, path: Path, alpha: float, seed: int, scratch: Path, **more: Any) -> Simulation:
    """One that has not begun."""
    base = TASKS[task]
    clients = {"registered": 100, "per_round": 10, "partition": "dirichlet", "alpha": alpha, **base.get("clients", {})}
    own = more.pop("clients", {})
    values = {"data": {"path": str(path)}, "run": {"seed": seed}, **base, "clients": {**clients, **own}, **more}
    config = settings.parse(values, "benchmark")
    found, _ = loaded(task, path, seed)
    channels, classes = found.source.shape[0], found.source.num_classes
    mean, std = [0.5] * channels, [0.25] * channels
    net = models.build(config.model, classes, found.source.shape, mean, std, seed=seed)
    return Simulation(config, found, net, scratch)


def curve(one: Simulation, found: dataset.Dataset, test_rows: dataset.Rows) -> dict[str, Any]:
    """All rounds, and what was seen at the end of every tenth of them."""
    rounds = one.config.rounds.number
    points = []
    for done in range(1, rounds + 1):
        one.step()
        if done % (rounds // 10) == 0:
            accuracy = one.accuracies(found.held_out)["clean"].accuracy
            totals = one.totals
            sent = (totals.download_bytes / 1e6, totals.upload_bytes / 1e6)
            points.append({"round": done, "down_mb": sent[0], "up_mb": sent[1], "s": one.clock_s, "accuracy": accuracy})
    test = one.accuracies(test_rows)
    return {"points": points, "test": {name: score.accuracy for name, score in test.items()}}


def compression(task: str, path: Path, seeds: int, scratch: Path) -> list[dict[str, Any]]:
    methods = [method for method in METHODS if method not in LEFT_OUT[task]]
    rows = []
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        cases = list(itertools.product(ALPHAS, methods))
        for row in pool.map(compressed, *zip(*[(task, path, seeds, scratch, *case) for case in cases], strict=True)):
            rows.append(row)
            say(row, "alpha", "method", "test", "down_mb", "up_mb", "s")
    return rows


def compressed(task: str, path: Path, seeds: int, scratch: Path, alpha: float, method: str) -> dict[str, Any]:
    """A row: one method, all seeds."""
    runs = []
    for seed in range(seeds):
        with simulation(task, path, alpha, seed, scratch / f"{alpha}-{method}", **METHODS[method]) as one:
            runs.append(curve(one, *loaded(task, path, seed)))
    ends = {name: record.interval([run["points"][-1][name] for run in runs]) for name in ("down_mb", "up_mb", "s")}
    test = record.interval([run["test"]["clean"] for run in runs])
    return {"alpha": alpha, "method": method, "test": test, **ends, "runs": runs}


def personal_models(task: str, path: Path, seeds: int, scratch: Path) -> list[dict[str, Any]]:
    rows = []
    for alpha in ALPHAS:
        runs = []
        for seed in range(seeds):
            more: dict[str, Any] = {"personal": {"epochs": 5, "penalty": 0.1}, "rounds": {"number": PERSONAL_ROUNDS}}
            more["clients"] = {"rows": None}  # rows of their own
            if task == "digits":
                more["clients"] |= {"registered": 10 if alpha < 1 else 30, "per_round": 5}
            with simulation(task, path, alpha, seed, scratch, **more) as one:
                alone = tuned(one, LOCAL_EPOCHS)
                for _ in range(one.config.rounds.number):
                    one.step()
                found = tuned(one, 5)
            own = {"local": alone.accuracies["ftfa"], **found.accuracies}
            runs.append({"clients": found.clients, "rows": found.rows, "accuracies": own})
        means = {name: record.interval([run["accuracies"][name] for run in runs]) for name in runs[0]["accuracies"]}
        rows.append({"alpha": alpha, "accuracies": means, "runs": runs})
        say(rows[-1], "alpha", "accuracies")
    return rows


def tuned(one: Simulation, epochs: int) -> personal.Personal:
    """Personal models of the first clients, from the present model."""
    assert one.config.personal is not None
    config = one.config.personal.model_copy(update={"epochs": epochs})
    return personal.evaluate(
        one.network,
        one.shared,
        one.parts_of,
        min(LOOKED_AT, one.partition.num_clients),
        one.images,
        one.labels,
        config,
        one.config.local,
        10,
        one.config.run.seed,
    )


def robust(task: str, path: Path, seeds: int, scratch: Path) -> list[dict[str, Any]]:
    rows = []
    attack = ATTACKS[task]
    methods: dict[str, dict[str, Any]] = {
        "natural": {},
        "adversarial": {"attack": attack},
        "adversarial, both 5 %": {"attack": attack, **METHODS["both 5 %"]},
    }
    for alpha, (method, more) in itertools.product(ALPHAS, methods.items()):
        runs = []
        for seed in range(seeds):
            with simulation(task, path, alpha, seed, scratch, **more) as one:
                for _ in range(one.config.rounds.number):
                    one.step()
                one.config = one.config.model_copy(  # natural training is attacked too
                    update={"attack": settings.LocalAttackConfig(**attack)}
                )
                test = one.accuracies(loaded(task, path, seed)[1])
            runs.append({name: vars(score) for name, score in test.items()})
        means = {name: record.interval([run[name]["accuracy"] for run in runs]) for name in runs[0]}
        rows.append({"alpha": alpha, "method": method, **means, "runs": runs})
        say(rows[-1], "alpha", "method", "clean", "robust")
    return rows


def say(row: dict[str, Any], *names: str) -> None:
    shown = {
        name: row[name]["mean"] if isinstance(row[name], dict) and "mean" in row[name] else row[name] for name in names
    }
    print(time.strftime("%H:%M:%S"), shown, flush=True)


def main() -> None:
    questions = {"compression": compression, "personal": personal_models, "robust": robust}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=questions)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as Parquet")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = data.write_digits(Path(folder) / "digits") if arguments.task == "digits" else arguments.data
        if path is None:
            parser.error("cifar10 needs --data")
        rows = questions[arguments.question](arguments.task, path, arguments.seeds, Path(folder) / "scratch")
    content = {"task": arguments.task, "settings": TASKS[arguments.task], "seeds": arguments.seeds, "rows": rows}
    print(record.write(f"federated_{arguments.question}_{arguments.task}", __doc__.splitlines()[0], content))


if __name__ == "__main__":
    main()
