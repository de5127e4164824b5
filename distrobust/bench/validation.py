"""The model against the lab: predicted and measured steps of 2 to 8 hosts on one shaped link.

The hosts of the lab share this machine's cores, so local costs are multiplied by threads / cores where there are more
threads than cores. That is the lab's doing, not the link's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distrobust.bench import comparison, cost, launch
from distrobust.bench.crossover import EXCHANGES, Machine, Network, columns, measure_machine, num_cores, sparse_method
from distrobust.bench.methods import DENSE, FP16, Method
from distrobust.lab import hosts as lab
from distrobust.lab.link import Link

BOUND = 0.2  # what the prediction is held to


@dataclass(frozen=True)
class Point:
    """One method in the lab. `measured_s`: median over steps of the slowest host."""

    num_hosts: int
    method: str
    exchange: str
    measured_s: float
    lower_s: float
    upper_s: float
    predicted_s: float
    local_s: float  # the part of it that is the processor's
    measured_bytes: float
    predicted_bytes: float

    @property
    def error(self) -> float:
        """Of the predicted time, relative to the measured one."""
        return self.predicted_s / self.measured_s - 1

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error}


def probe(link: Link) -> Network:
    """The lab's link as two hosts measure it."""
    with lab.lab(2, link) as hosts:
        num_bytes = max(100_000, round(link.payload_bytes_per_s))  # about a second
        found = launch.run(hosts, "distrobust.bench.probe:measure", {"num_bytes": num_bytes // 4 * 4})
    return Network(found[0]["bytes_per_s"], found[0]["latency_s"])


def points(
    network: Network,
    link: Link,
    hosts: Sequence[int],
    densities: Sequence[float],
    values: str,
    steps: int,
    threads: int,
    say: Callable[[str], None],
) -> list[Point]:
    """Measures every method on each number of `hosts`, right after the local costs that predict it.

    A machine that others use as well is not equally fast all the time; the sparse steps, which depend on it most,
    come first, and one method at a time: eight hosts with all of them at once would not fit into most memories.
    """
    here = "distrobust.bench.methods"
    methods = [sparse_method(density, values, exchange) for density in densities for exchange in EXCHANGES]
    methods += [Method(DENSE, f"{here}:dense"), Method(FP16, f"{here}:fp16")]
    made = []
    for num_hosts in hosts:
        say(f"{num_hosts} hosts: local costs")
        machine = measure_machine(densities, values, together=min(num_cores(), num_hosts), threads=threads)
        for method in methods:
            exchange = method.options.get("exchange", "dense")
            say(f"{num_hosts} hosts: {method.name}, {exchange}")
            row = comparison.compare([method], link, num_hosts, steps, threads=threads).rows[0]
            expected = predict(machine, method.name, exchange, num_hosts, num_cores() / threads)
            made.append(
                Point(
                    num_hosts,
                    method.name,
                    exchange,
                    row.median_s,
                    row.lower_s,
                    row.upper_s,
                    expected.seconds(network.bytes_per_s, network.latency_s),
                    expected.local_s,
                    row.payload_bytes,
                    expected.sent_bytes,
                )
            )
    return made


def predict(machine: Machine, method: str, exchange: str, num_hosts: int, cores: float) -> cost.Cost:
    """The cost of one exchange in the lab, whose hosts share `cores`, each by one thread."""
    shared = max(1.0, num_hosts / cores)
    crowded = Machine(
        {name: local.times(shared) for name, local in machine.local.items()},
        {name: local.times(shared) for name, local in machine.two_hops.items()},
        machine.message_bytes,
        machine.num_parameters,
    )
    return next(each for each in crowded.costs(method, num_hosts) if each.exchange == exchange)


def table(points: Sequence[Point], network: Network) -> list[str]:
    worst = max(points, key=lambda point: abs(point.error))
    cells = [
        [
            "hosts",
            "method",
            "by",
            "measured",
            "quartiles",
            "predicted",
            "of which local",
            "error",
            "MB measured",
            "MB predicted",
        ]
    ]
    for point in points:
        cells.append(
            [
                str(point.num_hosts),
                point.method,
                point.exchange,
                f"{point.measured_s:.3f} s",
                f"{point.lower_s:.3f} .. {point.upper_s:.3f}",
                f"{point.predicted_s:.3f} s",
                f"{point.local_s:.3f} s",
                f"{100 * point.error:+.0f} %",
                f"{point.measured_bytes / 1e6:.4g}",
                f"{point.predicted_bytes / 1e6:.4g}",
            ]
        )
    verdict = "all within" if abs(worst.error) <= BOUND else "not all within"
    return [
        f"The lab: hosts share {num_cores()} cores; its link as measured carries {network.bytes_per_s * 8 / 1e6:.4g} "
        f"Mbit/s of payload each way at once, {network.latency_s * 1e6:.0f} us a round.",
        "",
        *columns(cells),
        "",
        f"Largest error of a predicted time {100 * worst.error:+.0f} % ({worst.num_hosts} hosts, {worst.method}, "
        f"{worst.exchange}): {verdict} {100 * BOUND:.0f} %.",
    ]
