"""Prints the tables of benchmarks/README.md from the records, so that no figure there is typed by hand.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "pre-trained, clean": "natural model, clean",
    "pre-trained, PGD-20 Linf 8/255": "natural model, PGD-20 8/255",
    "fine-tuned, clean": "fine-tuned, clean",
    "fine-tuned, PGD-20 Linf 8/255": "fine-tuned, PGD-20 8/255, 2,000 images",
    "fine-tuned, PGD-20 Linf 8/255 (foolbox)": "fine-tuned, foolbox PGD-20 8/255, 1,000 images",
}


def cifar10(name: str = "cifar10") -> list[str]:
    """The lines of the CIFAR-10 table: dense against compressed, mean over seeds with its 95 % interval."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    summary = record["summary"]
    lines = [
        f"| CIFAR-10, %, mean of {len(record['seeds'])} seeds +- 95 % | dense | compressed |",
        "| --- | --- | --- |",
    ]
    for key, label in NAMES.items():
        dense, compressed = (_percent(summary[variant][key]) for variant in ("dense", "compressed"))
        lines.append(f"| {label} | {dense} | {compressed} |")
    fewer = [summary[variant]["fewer_bytes"]["mean"] for variant in ("dense", "compressed")]
    lines.append(f"| times fewer bytes over the whole fine-tuning | {fewer[0]:.1f} | {fewer[1]:.1f} |")
    return lines


KEYS = {"clean", "pgd20"}
EXAMPLES = {"n_fgsm": "N-FGSM", "pgd7": "PGD-7"}


def accuracy(*tasks: str, name: str = "accuracy") -> list[str]:
    """The rows of some tasks in the accuracy record: N workers inside one process. Intervals from three seeds on."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [row for task in tasks for row in record["rows"] if row["task"] == task]
    robust = any("pgd20" in row for row in rows)
    head = [
        *(["examples"] if robust else []),
        "method",
        "epochs",
        "workers",
        "clean",
        *(["PGD-20 8/255"] if robust else []),
        "times fewer bytes",
        "seeds",
    ]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for row in rows:
        digits = {
            key: {**row[key], "half_width_95": None} if len(row["runs"]) < 3 else row[key] for key in KEYS & {*row}
        }
        cells = [EXAMPLES[row["task"]]] if robust else []
        cells += [row["method"], str(row["epochs"]), str(row["workers"]), _percent(digits["clean"])]
        cells += [_percent(digits["pgd20"])] if robust else []
        cells += [f"{row['fewer_bytes']:.1f}", str(len(row["runs"]))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def step(name: str = "step") -> list[str]:
    """Step time and bytes between two hosts, for each link of the step record."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    links = list(record["links"])
    lines = [
        f"| ResNet-50's shapes, two hosts | {' | '.join(links)} |",
        "| --- |" + " --- |" * len(links),
    ]
    measured = [{row["name"]: row for row in record["links"][link]["rows"]} for link in links]
    for method in measured[0]:
        cells = [f"{rows[method]['median_s']:.3f} s, {rows[method]['wire_bytes'] / 1e6:.3f} MB" for rows in measured]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def multinode() -> list[str]:
    """The job on three hosts: step time and bytes of a host (mean over hosts and runs) on each link, and accuracy."""
    record = json.loads((RESULTS / "multinode.json").read_text())
    ways = ("dense", "compressed")
    lines = [f"| CIFAR-10, three hosts | {' | '.join(ways)} |", "| --- | --- | --- |"]
    for link, measured in record["links"].items():
        cells = []
        for way in ways:
            sent = [host["sent_bytes_a_step"] for run in measured[way]["runs"] for host in run["wire"].values()]
            cells.append(f"{measured[way]['median_step_s']:.2f} s; {sum(sent) / len(sent) / 1e6:.3g} MB")
        lines.append(f"| {link}: a step; sent by each host | {' | '.join(cells)} |")
    for i, score in enumerate(record["accuracy"]["dense"]["scores"]):
        both = [record["accuracy"][way]["scores"][i] for way in ways]
        if score["model"] == "fine-tuned":
            cells = [f"{100 * one['low']:.1f} - {100 * one['high']:.1f} %" for one in both]
            name = f"fine-tuned, {score['attack']}, {score['samples']:,} images, 95 % interval"
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def federated_compression(*tasks: str) -> list[str]:
    """Final test accuracy, bytes and simulated time of every method, for each task and concentration."""
    lines = [
        "| task | Dirichlet | method | test accuracy, % | MB down | MB up | simulated s |",
        "| --- |" + " --- |" * 6,
    ]
    for task in tasks:
        record = json.loads((RESULTS / f"federated_compression_{task}.json").read_text())
        for row in record["rows"]:
            seconds = sum(run["points"][-1]["s"] for run in row["runs"]) / len(row["runs"])
            sent = f"{row['down_mb']['mean']:.2f} | {row['up_mb']['mean']:.2f}"
            lines.append(
                f"| {task} | {row['alpha']} | {row['method']} | {_percent(row['test'])} | {sent} | {seconds:.0f} |"
            )
    return lines


def federated_personal(*tasks: str) -> list[str]:
    """Accuracy on clients' own test rows."""
    lines = ["| task | Dirichlet | local | FedAvg | FTFA | RTFA |", "| --- |" + " --- |" * 5]
    for task in tasks:
        record = json.loads((RESULTS / f"federated_personal_{task}.json").read_text())
        for row in record["rows"]:
            cells = [_percent(row["accuracies"][name]) for name in ("local", "global", "ftfa", "rtfa")]
            lines.append(f"| {task} | {row['alpha']} | {' | '.join(cells)} |")
    return lines


def federated_robust(*tasks: str) -> list[str]:
    """Clean and robust accuracy of federated models."""
    lines = ["| task | local training | Dirichlet | clean, % | PGD-20, % |", "| --- |" + " --- |" * 4]
    for task in tasks:
        for row in json.loads((RESULTS / f"federated_robust_{task}.json").read_text())["rows"]:
            cells = [task, row["method"], str(row["alpha"]), _percent(row["clean"]), _percent(row["robust"])]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def federated_speed() -> list[str]:
    """Client updates a second, of wall time and of processor time."""
    record = json.loads((RESULTS / "federated_speed.json").read_text())
    head = ("model", "registered", "simulator", "updates/s", "updates per processor second", "peak MB")
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * 5]
    for row in record["rows"]:
        for name, one in row["contenders"].items():
            cells = [
                "-" if one.get(key) is None else f"{one[key]:,.{digits}f}"
                for key, digits in (("updates_per_s", 1), ("updates_per_cpu_s", 1), ("peak_mb", 0))
            ]
            lines.append(f"| {row['model']} | {row['registered']:,} | {SIMULATORS[name]} | {' | '.join(cells)} |")
    return lines


SIMULATORS = {
    "batched": "distrobust, batched",
    "serial": "distrobust, serial",
    "pfl": "pfl-research 0.6",
    "flower": "Flower 1.41, 2 Ray actors",
}


def noise_estimators() -> list[str]:
    """Bias and deviation of every estimator of a layer's gradient noise: medians over layers, early and later."""
    rows = json.loads((RESULTS / "noise_estimators.json").read_text())["rows"]
    tasks = {"gpt": "GPT", "natural": "CIFAR-10, natural", "n_fgsm": "CIFAR-10, N-FGSM"}
    names = ("temporal", "independent", "spread", "projected")
    lines = [f"| task | after steps | {' | '.join(names)} |", "| --- | --- |" + " --- |" * len(names)]
    for key, task in tasks.items():
        for moment in rows[key]["moments"]:
            found = [moment["estimators"][name] for name in names]
            cells = [f"{one['bias']['median']:+.2f}, {one['deviation']['median']:.2f}" for one in found]
            lines.append(f"| {task} | {moment['steps_before']} | {' | '.join(cells)} |")
    return lines


def noise() -> list[str]:
    """Held-out loss of every optimizer at its best rate, and steps and seconds to the target."""
    tasks = {"gpt": "GPT", "natural": "CIFAR-10, natural", "n_fgsm": "CIFAR-10, N-FGSM"}
    lines = ["| task | sent | optimizer | rate | loss | steps to target | seconds |", "| --- |" + " --- |" * 6]
    for row in json.loads((RESULTS / "noise.json").read_text())["rows"]:
        steps, seconds = row["steps_to_target"], row["seconds_to_target"]
        cells = [tasks[row["task"]], "1 %" if row["compressed"] else "all", row["method"], f"{row['rate']:g}"]
        cells.append(f"{row['loss']['mean']:.3f} +- {row['loss']['half_width_95']:.3f}")
        cells += ["-" if steps is None else f"{steps['mean']:.0f} +- {steps['half_width_95']:.0f}"]
        cells += ["-" if seconds is None else f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def passes() -> list[str]:
    """Step times with k attack passes for each exchange, dense and at 1 %, on every link."""
    rows = json.loads((RESULTS / "passes.json").read_text())["rows"]
    links = list(dict.fromkeys(row["link"] for row in rows))
    lines = [f"| attack steps k | {' | '.join(links)} |", "| --- |" + " --- |" * len(links)]
    for k in dict.fromkeys(row["k"] for row in rows):
        cells = []
        for link in links:
            row = next(row for row in rows if (row["link"], row["k"]) == (link, k))
            dense, ours = row["step_s"]["dense"], row["step_s"]["1 %"]
            cells.append(f"{dense:.2f} s, {ours:.2f} s: {row['times_faster_than_dense']:.2f} times")
        lines.append(f"| {k} | {' | '.join(cells)} |")
    return lines


def training_speed() -> list[str]:
    """Images a second of adversarial training."""
    rows = json.loads((RESULTS / "training_speed.json").read_text())["rows"]
    names = ("floor", "distrobust", "distrobust, 1 %", "torchattacks", "ART")
    lines = [
        f"| method | model | precision | ranks | {' | '.join(names)} |",
        "| --- | --- | --- | --- |" + " --- |" * 5,
    ]
    for row in rows:
        speeds = [row["images_per_s"].get(name) for name in names]
        cells = [row["method"], row["model"], row["precision"], str(row["ranks"])]
        cells += ["-" if speed is None else f"{speed:,.0f}" for speed in speeds]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def robustness() -> list[str]:
    """Adversarial fine-tuning, one thing changed at a time: accuracy in % and minutes of training steps."""
    lines = ["| question | run | rate | clean | PGD-20 | AutoAttack | minutes |", "| --- | --- |" + " --- |" * 5]
    for row in json.loads((RESULTS / "robustness.json").read_text())["rows"]:
        scores = [next((v for k, v in row["scores"].items() if word in k), None) for word in ("clean", "PGD", "Auto")]
        cells = [row["question"], row["name"], f"{row['peak']:g}"]
        cells += ["-" if score is None else _percent(score) for score in scores]
        cells += [f"{row['train_minutes']['mean']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(values: dict[str, Any]) -> str:
    half = values["half_width_95"]
    return f"{100 * values['mean']:.1f}" + ("" if half is None else f" +- {100 * half:.1f}")


if __name__ == "__main__":
    print(
        "\n".join(
            [*accuracy("n_fgsm", "pgd7"), "", *accuracy("natural"), "", *step(), "", *cifar10(), "", *multinode()]
        )
    )
    tasks = ("digits", "cifar10")
    print("\n".join([*federated_compression(*tasks), *federated_personal(*tasks), *federated_robust(*tasks)]))
    print("\n".join([*federated_speed(), *noise_estimators(), *noise(), *passes(), *training_speed(), *robustness()]))
