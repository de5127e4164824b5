"""How well, and how cheaply, does each estimator know a layer's gradient noise?

    python benchmarks/noise_estimators.py [--text FILE] [--data DIR [--natural DIR]]

A model in training by AdamW, four workers with a quarter of the batch each. The truth H = 2 / 4 sum of variances of a
worker's gradient comes from 96 micro-batches at the same weights (their sample variance: unbiased, less uncertain the
more directions the noise has). Every estimator then sees 40 other global batches at those weights; `temporal` sees
pairs with a step of the optimizer between them. All in the Frobenius norm. Bias is mean / truth - 1, deviation the
standard deviation of one step's estimate over the truth, both for the layers of a model: median, and the 10th and 90th
percentile.

Overhead is measured apart: what a step spends on it, over forward, backward and optimizer, interleaved, medians; and
what the step of each optimizer takes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import record
import torch
from noise import METHODS
from tasks import Task, tasks
from torch import Tensor, nn

from distrobust.optim.lanton import Lanton
from distrobust.optim.noise import SpreadNoise, TemporalNoise
from distrobust.optim.norms import Norm

NUM_WORKERS, MICRO_BATCHES, TRIALS, WIDTH = 4, 96, 40, 4
Gradients = dict[str, Tensor]


class Sampler:
    """Gradients at a net's present weights, each from a share of a batch not used before."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed, self.batches, self.step = task, seed, task.batches(seed), 0

    def workers(self, net: nn.Module) -> list[Gradients]:
        """One global batch: each worker's gradient. Batch-norm statistics are left alone."""
        kept = [buffer.clone() for buffer in net.buffers()]
        batch, found = next(self.batches), []
        for rank in range(NUM_WORKERS):
            net.zero_grad(set_to_none=True)
            self.task.backward(net, batch, self.seed, self.step, rank, NUM_WORKERS)
            found.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
        torch._foreach_copy_(list(net.buffers()), kept) if kept else None
        self.step += 1
        return found


def mean(gradients: list[Gradients]) -> Gradients:
    return {name: torch.stack([g[name] for g in gradients]).mean(dim=0) for name in gradients[0]}


def square(a: Gradients, b: Gradients) -> dict[str, float]:
    return {name: float((a[name] - b[name]).double().square().sum()) for name in a}


def truth(net: nn.Module, sampler: Sampler) -> dict[str, float]:
    """2 / N times the sample variance, summed over coordinates, by running sums in float64."""
    total: dict[str, Tensor] = {}
    squares: dict[str, float] = {}
    count = 0
    for _ in range(MICRO_BATCHES // NUM_WORKERS):
        for g in sampler.workers(net):
            count += 1
            for name, values in g.items():
                total[name] = total.get(name, 0.0) + values.double()
                squares[name] = squares.get(name, 0.0) + float(values.double().square().sum())
    variance = {n: (squares[n] - float(t.square().sum()) / count) / (count - 1) for n, t in total.items()}
    return {name: 2.0 / NUM_WORKERS * value for name, value in variance.items()}


def estimates(net: nn.Module, optimizer: torch.optim.Optimizer, sampler: Sampler) -> dict[str, list[dict[str, float]]]:
    """By estimator, trial and parameter."""
    found: dict[str, list[dict[str, float]]] = {"temporal": [], "independent": [], "spread": [], "projected": []}
    parameters = dict(net.named_parameters())
    norms: dict[str, Norm] = dict.fromkeys(parameters, "frobenius")
    exact, projected = (SpreadNoise(parameters, norms, 0.0, WIDTH) for _ in range(2))
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(TRIALS):
        local = sampler.workers(net)
        average = mean(local)
        found["independent"].append(square(average, mean(sampler.workers(net))))
        exact.commit({n: torch.stack([exact.compare(n, g[n], average[n]) for g in local]) for n in average}, False)
        found["spread"].append(exact.by_name())
        projected.commit({n: torch.stack([projected.observe(n, g[n]) for g in local]) for n in average}, True)
        found["projected"].append(projected.by_name())
        for name, parameter in parameters.items():
            parameter.grad = average[name].clone()
        optimizer.step()
        found["temporal"].append(square(mean(sampler.workers(net)), average))
        net.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
    return found


def summary(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=10)
    return {"median": statistics.median(values), "10 %": cuts[0], "90 %": cuts[-1]}


def compare(task: Task, steps: int) -> dict[str, Any]:
    net = task.make(0)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    batches = task.batches(1)
    for step in range(steps):
        optimizer.zero_grad()
        task.backward(net, next(batches), 1, step, 0, 1)
        optimizer.step()
    true = truth(net, Sampler(task, 2))
    found = estimates(net, optimizer, Sampler(task, 3))
    rows = {}
    for name, trials in found.items():
        relative = {p: [trial[p] / true[p] for trial in trials] for p in true}
        rows[name] = {
            "bias": summary([statistics.fmean(values) - 1.0 for values in relative.values()]),
            "deviation": summary([statistics.stdev(values) for values in relative.values()]),
        }
        print(f"  {name:<12} bias {rows[name]['bias']}\n{'':15}deviation {rows[name]['deviation']}", flush=True)
    return {"steps_before": steps, "parameters": len(true), "estimators": rows}


def overhead(task: Task, repeats: int = 15) -> dict[str, Any]:
    """Seconds of a step of one worker with the whole batch, and of each way to measure, interleaved."""
    net = task.make(0)
    net.train()
    plain, lanton = Lanton(net, 0.01, noise="none"), Lanton(net, 0.01)
    parameters = dict(net.named_parameters())
    frobenius: dict[str, Norm] = dict.fromkeys(parameters, "frobenius")
    assert lanton.noise is not None
    temporal = TemporalNoise(parameters, frobenius, 0.9)
    spread = SpreadNoise(parameters, frobenius, 0.9, WIDTH)
    dual = TemporalNoise(parameters, lanton.noise.norms, 0.9)
    optimizers = {
        name: METHODS[name].make(net, 1e-5)
        for name in ("SGD", "AdamW", "Muon, AdamW for the rest", "LANTON without noise", "noise-adaptive AdamW")
    }
    seconds: dict[str, list[float]] = {}

    def clock(name: str, started: float) -> float:
        now = time.perf_counter()
        seconds.setdefault(name, []).append(now - started)
        return now

    batches = task.batches(0)
    for step in range(repeats):
        batch = next(batches)
        started = time.perf_counter()
        plain.zero_grad()
        task.backward(net, batch, 0, step, 0, 1)
        plain.step()
        now = clock("step", started)
        g = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        temporal.measure(g)
        now = clock("temporal, Frobenius", now)
        dual.measure(g)
        now = clock("temporal, dual norms of LANTON", now)
        sent = {name: spread.observe(name, one) for name, one in g.items()}
        spread.commit({name: torch.stack([row] * NUM_WORKERS) for name, row in sent.items()}, True)
        now = clock("spread, projected", now)
        exact = {name: spread.compare(name, one, one) for name, one in g.items()}
        spread.commit({name: torch.stack([row] * NUM_WORKERS) for name, row in exact.items()}, False)
        now = clock("spread, exact", now)
        for name, optimizer in optimizers.items():
            optimizer.step()
            now = clock(name, now)
    medians = {name: statistics.median(values[3:]) for name, values in seconds.items()}
    steps = {name: medians.pop(name) for name in optimizers}
    shares = {name: value / medians["step"] for name, value in medians.items() if name != "step"}
    print("  share of a step: " + ", ".join(f"{name} {share:.2%}" for name, share in shares.items()), flush=True)
    print("  optimizers, ms: " + ", ".join(f"{name} {1e3 * s:.1f}" for name, s in steps.items()), flush=True)
    return {"step_s": medians["step"], "share_of_step": shares, "optimizer_step_s": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--natural", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 200], help="steps of training before")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, task in tasks(a.text, a.data, a.natural).items():
        print(name, flush=True)
        moments = [compare(task, steps) for steps in a.steps]
        rows[name] = {"moments": moments, "overhead": overhead(task)}
    bytes_each = {"projected": 4 * WIDTH, "exact (dense phases)": 4, "temporal (compressed)": 4}
    content = {"setting": __doc__, "workers": NUM_WORKERS, "bytes_per_parameter": bytes_each, "rows": rows}
    print(record.write("noise_estimators", "How well, and how cheaply, is gradient noise known?", content))


if __name__ == "__main__":
    main()
