"""`distrobust bench crossover`, from the options as they were typed to the lines that are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from distrobust.bench import crossover, crossover_plot, validation
from distrobust.bench.crossover import Network
from distrobust.bench.methods import parse_densities
from distrobust.bench.validation import Point
from distrobust.errors import ConfigError
from distrobust.lab import hosts as lab
from distrobust.lab.link import parse_latency, parse_link

LAB_HOSTS = (2, 8)  # smallest and largest number of hosts that are worth simulating


def command(
    bandwidth: str,
    latency: str,
    densities: str,
    values: str,
    parameters: int,
    in_lab: bool,
    hosts: str,
    steps: int,
    threads: int,
    plot: Path | None,
    out: Path | None,
) -> Iterator[str]:
    """Yields the lines as they become known. Everything typed is checked before anything is measured."""
    link = parse_link(bandwidth)
    network = Network(link.payload_bytes_per_s, parse_latency(latency))
    shares = parse_densities(densities)
    numbers = _parse_hosts(hosts)
    if plot is not None:
        crossover_plot.check(plot)
    reason = lab.why_not() if in_lab else None

    yield "Measured on this machine, ResNet-50's shapes, no slow link:"
    machine = crossover.measure_machine(shares, values, threads=threads, num_parameters=parameters)
    yield from ["", *crossover.costs_here(machine), ""]
    yield from crossover.table(machine, network)
    written = crossover.to_json(machine, network)
    points: list[Point] = []
    if in_lab and reason is not None:
        yield from ["", f"No measured points: {reason}."]
    elif in_lab:
        lab_network = validation.probe(link)
        points = validation.points(lab_network, link, numbers, shares, values, steps, threads, _to_stderr)
        yield from ["", *validation.table(points, lab_network)]
        written["lab"] = {
            "bytes_per_s": lab_network.bytes_per_s,
            "latency_s": lab_network.latency_s,
            "cores_shared_by_all_hosts": crossover.num_cores(),
            "steps": steps,
            "points": [point.to_json() for point in points],
        }
    if plot is not None:
        crossover_plot.draw(plot, machine, network, points)
        yield from ["", f"plot: {plot}"]
    if out is not None:
        out.write_text(json.dumps(written, indent=1) + "\n")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse_hosts(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(LAB_HOSTS[0] <= number <= LAB_HOSTS[1] for number in numbers):
        raise ConfigError(f"hosts: got {text!r}, wanted numbers from {LAB_HOSTS[0]} to {LAB_HOSTS[1]} such as 2,4,8")
    return numbers
