"""From measured local costs and a link to the table of `distrobust bench crossover`: when does compression pay?

`cost.py` has the formulas; this file applies them to what was measured on this machine. Everything it returns for a
number of workers is computed, on the assumption of one worker a machine.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distrobust.bench import cost, launch
from distrobust.bench.cost import Cost, Local
from distrobust.bench.methods import DENSE, FP16, SETTLED, Method, percent
from distrobust.bench.shapes import NUM_PARAMETERS
from distrobust.lab import hosts as lab
from distrobust.lab.link import GOODPUT

WORKERS = tuple(2**power for power in range(1, 11))
EXCHANGES = ("all_gather", "sharded")
_PRETENDED = (2, 10)  # workers whose messages one process decodes: two points of a line
_BETWEEN = (2, 4)  # processes
_TIMED_STEPS = 7


@dataclass(frozen=True)
class Network:
    """`bytes_per_s`: payload, each way; `latency_s`: one way."""

    bytes_per_s: float
    latency_s: float

    @property
    def bits_per_s(self) -> float:
        """With packet headers, as links are sold."""
        return self.bytes_per_s * 8 / GOODPUT


@dataclass(frozen=True)
class Machine:
    """What one worker's step costs here, by method; `two_hops`: sharded; `message_bytes`: of one worker, in one hop."""

    local: dict[str, Local]
    two_hops: dict[str, Local]
    message_bytes: dict[str, float]
    num_parameters: int

    @property
    def sparse(self) -> list[str]:
        return list(self.message_bytes)

    def costs(self, method: str, num_workers: int) -> list[Cost]:
        """The ways in which `method` can exchange; a sparse one falls back to dense where nothing else pays."""
        plain = cost.dense(num_workers, 4 * self.num_parameters, self.local[DENSE])
        if method == DENSE:
            return [plain]
        if method == FP16:
            return [cost.dense(num_workers, 2 * self.num_parameters, self.local[FP16])]
        message = self.message_bytes[method]
        gathered = cost.all_gather(num_workers, message, self.local[method])
        return [gathered, cost.sharded(num_workers, message, self.two_hops[method]), plain]

    def cost(self, method: str, num_workers: int, network: Network) -> Cost:
        return cost.fastest(self.costs(method, num_workers), network.bytes_per_s, network.latency_s)

    def crossover(self, method: str, rival: str, num_workers: int, latency_s: float) -> float:
        """Bits per second, headers included, below which sparse `method` beats `rival`: 0 never, inf always."""
        sparse = [each for each in self.costs(method, num_workers) if each.exchange != "dense"]
        bytes_per_s = cost.crossover(sparse, self.costs(rival, num_workers)[0], latency_s)
        return bytes_per_s * 8 / GOODPUT


def sparse_method(density: float, values: str, exchange: str) -> Method:
    options = {"density": density, "exchange": exchange} | ({"values": values} if values else {})
    return Method(percent(density), "distrobust.bench.methods:ours", options, warmup=SETTLED)


def measure_machine(
    densities: Sequence[float],
    values: str,
    *,
    together: int = 1,
    threads: int = 1,
    num_parameters: int = NUM_PARAMETERS,
) -> Machine:
    """Times the hooks without a slow link; scaled to `num_parameters` from ResNet-50's.

    Dense and 16-bit in `together` processes that do not speak to each other. Ours between two processes over loopback;
    what each further message costs a pretended larger group says for the all_gather, and four processes for sharded,
    where every rank's parts differ in length.
    """
    here = "distrobust.bench.methods"
    plain = {DENSE: f"{here}:floor", FP16: f"{here}:fp16"}
    alone = _without_exchange({"1": [Method(*each) for each in plain.items()]}, together, threads)
    local = {name: Local(statistics.median(seconds["1"])) for name, seconds in alone.items()}
    sparse = [sparse_method(density, values, "all_gather") for density in densities]
    pretended = _without_exchange({str(n): sparse for n in _PRETENDED}, 1, threads)
    slopes = {name: _fitted(seconds).per_message_s for name, seconds in pretended.items()}
    gathered, messages = _between_processes(sparse, 2, threads)
    local |= {name: Local(max(0.0, s - 2 * slopes[name]), slopes[name]) for name, s in gathered.items()}
    methods = [sparse_method(density, values, "sharded") for density in densities]
    by_workers = {n: _between_processes(methods, n, threads)[0] for n in _BETWEEN}
    two_hops = {m.name: cost.fit({n: found[m.name] for n, found in by_workers.items()}) for m in methods}
    scale = num_parameters / NUM_PARAMETERS
    return Machine(
        {name: each.times(scale) for name, each in local.items()},
        {name: each.times(scale) for name, each in two_hops.items()},
        {name: size * scale for name, size in messages.items()},
        num_parameters,
    )


def _without_exchange(
    methods: dict[str, list[Method]], together: int, threads: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of steps by method and number of workers pretended, of all processes that ran `together`."""
    arguments = {"methods": {n: [m.to_json() for m in each] for n, each in methods.items()}, "steps": _TIMED_STEPS}
    ranks = launch.run(
        lab.local(together), "distrobust.bench.local_cost:measure", arguments, threads=threads, timeout_s=900.0
    )
    return {
        name: {n: [s for rank in ranks for s in rank[name][n]] for n in by_workers}
        for name, by_workers in ranks[0].items()
    }


def _fitted(seconds: dict[str, list[float]]) -> Local:
    return cost.fit({int(n): statistics.median(each) for n, each in seconds.items()})


def _between_processes(methods: list[Method], workers: int, threads: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step over loopback, where the exchange itself takes next to nothing; bytes to each other worker.

    One method at a time, as in training: several residuals in one process get into each other's way. Started twice, of
    which the faster counts: whatever else a machine does can only add to a step. Where there are more threads than
    cores they take turns, and a step is divided by how many share a core.
    """
    seconds: dict[str, float] = {}
    messages = {}
    for method in 2 * methods:
        arguments = {"methods": [method.to_json()], "steps": _TIMED_STEPS, "interface": None, "timeout_s": 300.0}
        ranks = launch.run(
            lab.local(workers), "distrobust.bench.step:measure", arguments, threads=threads, timeout_s=900.0
        )
        rounds = list(zip(*(rank[method.name] for rank in ranks), strict=True))
        step_s = statistics.median(max(record["seconds"] for record in records) for records in rounds)
        step_s /= max(1.0, workers * threads / num_cores())
        seconds[method.name] = min(step_s, seconds.get(method.name, math.inf))
        messages[method.name] = rounds[0][0]["counted_bytes"] / (workers - 1)
    return seconds, messages


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def table(machine: Machine, network: Network) -> list[str]:
    """Step time and bytes for every number of workers, and the crossover bandwidths; all of it computed."""
    methods = [DENSE, FP16, *machine.sparse]
    lines = [
        f"{machine.num_parameters:,} parameters; link {network.bits_per_s / 1e6:.4g} Mbit/s each way, "
        f"{network.latency_s * 1e3:.3g} ms; one worker a machine like this one.",
        "Times and bytes are computed, from the local costs of a few workers on a straight line:",
        "",
    ]
    cells = [["workers", *(column for name in methods for column in (name, "MB sent", *_via(name, "by")))]]
    for num_workers in WORKERS:
        row = [str(num_workers)]
        for name in methods:
            best = machine.cost(name, num_workers, network)
            seconds = best.seconds(network.bytes_per_s, network.latency_s)
            row += [f"{seconds:.3f} s", f"{best.sent_bytes / 1e6:.4g}", *_via(name, best.exchange)]
        cells.append(row)
    lines += [*columns(cells), "", "Compression is faster on every link slower than (computed):", ""]
    cells = [["workers", *(f"{name} against {rival}" for name in machine.sparse for rival in ("dense", "16-bit"))]]
    for num_workers in WORKERS:
        crossings = [
            machine.crossover(name, rival, num_workers, network.latency_s)
            for name in machine.sparse
            for rival in (DENSE, FP16)
        ]
        cells.append([str(num_workers), *(bandwidth(bits_per_s) for bits_per_s in crossings)])
    return lines + columns(cells)


def costs_here(machine: Machine) -> list[str]:
    """What was measured on this machine, per coordinate of the gradient and per coordinate sent."""
    n = machine.num_parameters
    lines = []
    for name, local in machine.local.items():
        line = f"  {name}: {local.decoding(0) * 1e3:.1f} ms a step, {local.decoding(0) / n * 1e9:.2f} ns a coordinate"
        if name in machine.message_bytes:
            hops = machine.two_hops[name]
            line += (
                f", and {local.per_message_s * 1e3:.1f} ms for each message; sharded {hops.fixed_s * 1e3:.1f} ms and "
                f"{hops.per_message_s * 1e3:.1f} ms for each worker; a message has "
                f"{machine.message_bytes[name] / 1e6:.4g} MB"
            )
        lines.append(line)
    return lines


def bandwidth(bits_per_s: float) -> str:
    if bits_per_s in (0.0, float("inf")):
        return "never" if bits_per_s == 0.0 else "always"
    return f"{bits_per_s / 1e9:.3g} Gbit/s" if bits_per_s >= 1e9 else f"{bits_per_s / 1e6:.3g} Mbit/s"


def columns(cells: list[list[str]]) -> list[str]:
    """Rows of text, aligned to the right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _via(name: str, text: str) -> list[str]:
    return [] if name in (DENSE, FP16) else [text]


def to_json(machine: Machine, network: Network) -> dict[str, Any]:
    names = [DENSE, FP16, *machine.sparse]
    rows = []
    for num_workers in WORKERS:
        for name in names:
            best = machine.cost(name, num_workers, network)
            rows.append(
                {
                    "workers": num_workers,
                    "method": name,
                    "exchange": best.exchange,
                    "seconds": best.seconds(network.bytes_per_s, network.latency_s),
                    "sent_bytes": best.sent_bytes,
                }
            )
    crossings = [
        {
            "workers": num_workers,
            "method": name,
            "against": rival,
            "bits_per_s": machine.crossover(name, rival, num_workers, network.latency_s),
        }
        for num_workers in WORKERS
        for name in machine.sparse
        for rival in (DENSE, FP16)
    ]
    local = {name: asdict(each) for name, each in machine.local.items()}
    return {
        "parameters": machine.num_parameters,
        "bytes_per_s": network.bytes_per_s,
        "latency_s": network.latency_s,
        "measured_local_costs": local,
        "measured_sharded_costs": {name: asdict(each) for name, each in machine.two_hops.items()},
        "measured_message_bytes": machine.message_bytes,
        "computed_steps": rows,
        "computed_crossovers": crossings,
    }
