"""Do noise-adaptive rates pay? Optimizers against each other, dense and at 1 %, on three tasks (tasks.py).

    python benchmarks/noise.py cells [--only TEXT]
    python benchmarks/noise.py run [--text FILE] [--data DIR [--natural DIR]] [--only TEXT] [--work DIR]
    python benchmarks/noise.py time [--text FILE] [--data DIR [--natural DIR]] [--work DIR]
    python benchmarks/noise.py write [--work DIR]

Four workers inside one process. Every method has one rate to tune and the same budget for it: four rates, a factor of
about three apart, each in a run of half the length with a seed of its own; the one with the lowest held-out loss is
taken for three seeds at full length. Rates rise over a tenth of the run and fall linearly to zero; no weight decay.
Under compression (1 % of the coordinates, 4 bits) the rates are those of the dense runs.

Target: the held-out loss that AdamW has on average after three quarters of its run. Seconds to it are steps times the
seconds of a step, which `time` measures of all methods in turns (medians, all four workers one after the other,
exchange included), with nothing else running.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from tasks import Task, tasks
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from workers import Workers

from distrobust.compression.memory import Rule
from distrobust.optim.adaptive import NoiseAdaptive
from distrobust.optim.lanton import Lanton
from distrobust.optim.norms import as_matrix
from distrobust.optim.schedules import Schedule

NUM_WORKERS, SEEDS, TUNING_SEED, EVALUATIONS, TIMED_TURNS = 4, (0, 1, 2), 3, 20, 7
COMPRESSED: dict[str, Any] = {"density": 0.01, "values": "4bit"}


class MuonForAll(Optimizer):
    """torch.optim.Muon for hidden matrices, convolutions among them as matrices, and AdamW for the rest, at one rate.

    Muon takes two dimensions only, so it is given views of the kernels.
    """

    def __init__(self, net: nn.Module, lr: float) -> None:
        groups = Lanton(net).param_groups
        hidden = [p for group in groups if group["norm"] == "spectral" for p in group["params"]]
        rest = [p for group in groups if group["norm"] != "spectral" for p in group["params"]]
        self.hidden = [(p, nn.Parameter(_view(p.detach()))) for p in hidden]
        views = [view for _, view in self.hidden]
        self.inner = [Muon(views, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
        self.inner += [AdamW(rest, lr=lr, weight_decay=0.0)]
        super().__init__(net.parameters(), {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for parameter, view in self.hidden:
            assert parameter.grad is not None
            view.grad = _view(parameter.grad)
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            optimizer.step()


def _view(tensor: Tensor) -> Tensor:
    """(out, in * kernel) of the same memory; columns of a channels-last kernel come in another order, which the polar
    factor does not mind."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).reshape(len(tensor), -1)
    return as_matrix(tensor)


@dataclass(frozen=True)
class Method:
    """make: builds the optimizer. rates: to choose from, by task. residual: SGD's momentum is there at 1 %."""

    make: Callable[[nn.Module, float], Optimizer]
    rates: dict[str, tuple[float, ...]]
    residual: bool = False


# by task, since a start from a trained model wants larger rates; with noise only the quietest layer of a group moves at
# the full one
ADAM_RATES = {"gpt": (3e-4, 1e-3, 3e-3, 1e-2), "natural": (3e-4, 1e-3, 3e-3, 1e-2), "n_fgsm": (3e-3, 1e-2, 3e-2, 1e-1)}
MUON_RATES = {"gpt": (1e-3, 3e-3, 1e-2, 3e-2), "natural": (1e-3, 3e-3, 1e-2, 3e-2), "n_fgsm": (3e-3, 1e-2, 3e-2, 1e-1)}
NOISY_RATES = {"gpt": (3e-3, 1e-2, 3e-2, 1e-1), "natural": (3e-3, 1e-2, 3e-2, 1e-1), "n_fgsm": (1e-2, 3e-2, 1e-1, 3e-1)}
SGD_RATES = {"natural": (0.003, 0.01, 0.03, 0.1), "n_fgsm": (0.03, 0.1, 0.3, 1.0)}
METHODS: dict[str, Method] = {
    "AdamW": Method(lambda net, lr: AdamW(net.parameters(), lr=lr, weight_decay=0.0), ADAM_RATES),
    "Muon, AdamW for the rest": Method(MuonForAll, MUON_RATES),
    "LANTON without noise": Method(lambda net, lr: Lanton(net, lr, noise="none"), MUON_RATES),
    "LANTON": Method(lambda net, lr: Lanton(net, lr), NOISY_RATES),
    "LANTON, spread of workers": Method(lambda net, lr: Lanton(net, lr), NOISY_RATES),
    "noise-adaptive AdamW": Method(
        lambda net, lr: NoiseAdaptive(AdamW(net.parameters(), lr=lr, weight_decay=0.0), net), ADAM_RATES
    ),
    "SGD": Method(lambda net, lr: _sgd(net, lr), SGD_RATES),
    "noise-adaptive SGD": Method(lambda net, lr: NoiseAdaptive(_sgd(net, lr), net), SGD_RATES),
    "SGD, momentum in the residual": Method(lambda net, lr: SGD(net.parameters(), lr=lr), SGD_RATES, True),
    "noise-adaptive SGD, momentum in the residual": Method(
        lambda net, lr: NoiseAdaptive(SGD(net.parameters(), lr=lr), net), SGD_RATES, True
    ),
}
TUNED_AS = {  # the rate of a close relative
    "LANTON, spread of workers": "LANTON",
    "SGD, momentum in the residual": "SGD",
    "noise-adaptive SGD, momentum in the residual": "noise-adaptive SGD",
}


def _sgd(net: nn.Module, lr: float) -> SGD:
    return SGD(net.parameters(), lr=lr, momentum=0.9)


def cells() -> list[tuple[str, str, bool]]:
    """(task, method, compressed)"""
    found = []
    for task in ("gpt", "natural", "n_fgsm"):
        for compressed in (False, True):
            for name, method in METHODS.items():
                if task == "gpt" and "SGD" in name:
                    continue  # does not train a transformer at any of these rates
                if task != "gpt" and name == "noise-adaptive AdamW":
                    continue
                if (method.residual and not compressed) or (compressed and task == "n_fgsm"):
                    continue
                if compressed and name == "LANTON, spread of workers":
                    continue  # nobody knows the mean: LANTON measures successive gradients of every worker
                found.append((task, name, compressed))
    return found


def name_of(cell: tuple[str, str, bool]) -> str:
    task, method, compressed = cell
    return f"{task}, {'1 %' if compressed else 'dense'}: {method}"


class Run:
    """A method on a task, step by step. seconds: of every step so far."""

    def __init__(self, task: Task, name: str, rate: float, seed: int, steps: int, compressed: bool) -> None:
        method = METHODS[name]
        self.task, self.seed, self.steps = task, seed, steps
        self.net = task.make(seed)
        self.net.train()
        self.optimizer = method.make(self.net, rate)
        observers = []
        if isinstance(self.optimizer, NoiseAdaptive | Lanton) and (compressed or name != "LANTON"):
            parameters = dict(self.net.named_parameters())
            observer = self.optimizer.observer_for(NUM_WORKERS, not compressed, parameters)
            if observer is not None:
                observers = [observer, *(copy.deepcopy(observer) for _ in range(NUM_WORKERS - 1))]
        rule = Rule(momentum=0.9 if method.residual else 0.0, masking=method.residual)
        options = COMPRESSED if compressed else {}
        self.workers = Workers(self.net, NUM_WORKERS, steps, rule, observers=observers, **options)
        self.schedule, self.batches = Schedule("one_cycle", rate, 0.1), task.batches(seed)
        self.seconds: list[float] = []

    def step(self) -> None:
        batch, step = next(self.batches), len(self.seconds)
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(step / self.steps)
        self.workers.step_with(
            self.optimizer, lambda rank: self.task.backward(self.net, batch, self.seed, step, rank, NUM_WORKERS)
        )
        self.seconds.append(time.perf_counter() - started)


def train(task: Task, name: str, rate: float, seed: int, steps: int, compressed: bool) -> dict[str, Any]:
    """A whole run: held-out losses with the step at which they were taken."""
    one, trace = Run(task, name, rate, seed, steps, compressed), []
    for step in range(1, steps + 1):
        one.step()
        if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
            one.workers.average_buffers()
            trace.append([step, task.held_out_loss(one.net)])
    return {
        "rate": rate,
        "seed": seed,
        "trace": trace,
        "loss": trace[-1][1],
        "commit": record.COMMIT,
        **one.workers.bytes(),
    }


def time_steps(chosen: list[tuple[str, str, bool]], found: dict[str, Task], path: Path) -> None:
    """Seconds of a step of every cell, the cells of a task in turns: medians of the mean of four steps, since LANTON
    measures noise in one of four."""
    medians: dict[str, float] = {}
    for name, task in found.items():
        runs = {
            name_of(cell): Run(task, cell[1], METHODS[cell[1]].rates[name][0], 0, task.steps, cell[2])
            for cell in chosen
            if cell[0] == name
        }
        for _ in range(TIMED_TURNS):
            for one in runs.values():
                for _ in range(4):
                    one.step()
        for label, one in runs.items():
            turns = [statistics.fmean(one.seconds[i : i + 4]) for i in range(0, len(one.seconds), 4)]
            medians[label] = statistics.median(turns[1:])
    path.write_text(json.dumps({"commit": record.COMMIT, "step_s": medians}))


def run(cell: tuple[str, str, bool], task: Task, work: Path) -> None:
    """Tunes, unless compressed, and runs the seeds; every run a file, so that several processes share the work."""
    task_name, name, compressed = cell
    tuned = TUNED_AS.get(name, name)
    if not compressed and tuned == name:
        for rate in METHODS[name].rates[task_name]:
            path = work / f"{name_of(cell)}, tuning at {rate:g}.json"
            once(path, lambda rate=rate: train(task, name, rate, TUNING_SEED, task.steps // 2, False))
    best = best_rate(work, (task_name, tuned, False))
    if best is None:
        return  # another process is still tuning; the next call takes it up
    for seed in SEEDS:
        once(
            work / f"{name_of(cell)}, seed {seed}.json",
            lambda seed=seed: train(task, name, best, seed, task.steps, compressed),
        )


def once(path: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Unless somebody else has begun."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return
    try:
        result = make()
    except BaseException:
        path.unlink()
        raise
    path.write_text(json.dumps(result))
    print(f"{path.stem}: loss {result['loss']:.4f}", flush=True)


def best_rate(work: Path, cell: tuple[str, str, bool]) -> float | None:
    """None while a tuning run is missing."""
    runs = [_read(work / f"{name_of(cell)}, tuning at {rate:g}.json") for rate in METHODS[cell[1]].rates[cell[0]]]
    if any(one is None for one in runs):
        return None
    return float(min((one for one in runs if one is not None), key=_final)["rate"])


def _final(result: dict[str, Any]) -> float:
    loss = float(result["loss"])
    return loss if loss == loss else float("inf")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() and path.stat().st_size else None


def write(work: Path) -> Path:
    """The record of all cells whose seeds are there."""
    timed = _read(work / "seconds.json")
    if timed is None:
        raise SystemExit(f"noise.py write: no {work / 'seconds.json'}: run `noise.py time` first")
    rows = []
    for cell in cells():
        task, name, compressed = cell
        runs = [_read(work / f"{name_of(cell)}, seed {seed}.json") for seed in SEEDS]
        if any(one is None for one in runs):
            continue
        done: list[dict[str, Any]] = [one for one in runs if one is not None]
        target = _target(work, task)
        row = {"task": task, "method": name, "compressed": compressed, "rate": done[0]["rate"]}
        tuning = (task, TUNED_AS.get(name, name), False)
        row["tuning"] = {
            f"{rate:g}": (_read(work / f"{name_of(tuning)}, tuning at {rate:g}.json") or {}).get("loss")
            for rate in METHODS[name].rates[task]
        }
        row["loss"] = record.interval([one["loss"] for one in done])
        row["step_s"] = timed["step_s"][name_of(cell)]
        row["fewer_bytes"] = done[0]["dense_bytes"] / max(1, done[0]["sent_bytes"])
        row["target_loss"] = target
        reached = [_reached(one["trace"], target) for one in done]
        steps = None if None in reached else record.interval([r for r in reached if r is not None])
        row["steps_to_target"] = steps
        row["seconds_to_target"] = steps and steps["mean"] * row["step_s"]
        row["runs"] = done
        rows.append(row)
    return record.write("noise", "Do noise-adaptive rates pay?", {"setting": __doc__, "rows": rows})


def _target(work: Path, task: str) -> float:
    losses = []
    for seed in SEEDS:
        result = _read(work / f"{name_of((task, 'AdamW', False))}, seed {seed}.json")
        if result is not None:
            trace = result["trace"]
            losses.append(trace[len(trace) * 3 // 4 - 1][1])
    return sum(losses) / len(losses) if losses else float("nan")


def _reached(trace: list[list[float]], target: float) -> float | None:
    """Steps after which the loss is at the target for the first time, between two evaluations by a straight line."""
    before = None
    for step, loss in trace:
        if loss <= target:
            if before is None:
                return step
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cells", "run", "time", "write"])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--natural", type=Path)
    parser.add_argument("--only", default="", help="cells whose name contains this; several separated by |")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-noise"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [cell for cell in cells() if any(text in name_of(cell) for text in a.only.split("|"))]
    if a.what == "cells":
        print("\n".join(map(name_of, chosen)))
    elif a.what == "write":
        print(write(a.work))
    else:
        a.work.mkdir(parents=True, exist_ok=True)
        found = tasks(a.text, a.data, a.natural)
        if a.what == "time":
            time_steps(chosen, found, a.work / "seconds.json")
        for _ in range(2 if a.what == "run" else 0):  # again: what waited for another process' tuning
            for cell in chosen:
                if cell[0] in found:
                    run(cell, found[cell[0]], a.work)


if __name__ == "__main__":
    main()
