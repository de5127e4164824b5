"""`distrobust bench step`: runs the hosts, makes one row of every method, prints the table.

On a shaped link of the lab everything is measured. Where there can be no lab the ranks are processes joined by
loopback: bytes are still counted, the time on the link is computed from them and the table says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distrobust.bench import launch
from distrobust.bench.methods import DENSE, FLOOR, Method, parse_densities, standard
from distrobust.bench.shapes import NUM_PARAMETERS, NUM_TENSORS
from distrobust.errors import ConfigError, LabError
from distrobust.lab import hosts as lab
from distrobust.lab.link import HEADER_BYTES, Link, parse_link

MAX_STEPS = 10_000
_TRIAL_S = 120.0


@dataclass(frozen=True)
class Row:
    """One method: seconds and bytes of a step on one rank. Bytes are medians over rounds of the mean over ranks."""

    name: str
    median_s: float  # over rounds, of the slowest rank
    lower_s: float  # quartiles
    upper_s: float
    minus_floor_s: float
    payload_bytes: float
    wire_bytes: float | None  # with packet headers; None where there is no lab
    header_bytes: float | None
    counted_bytes: float | None  # by the method itself

    @property
    def heaviest_bytes(self) -> float:
        """On the wire where that was counted, else payload."""
        return self.payload_bytes if self.wire_bytes is None else self.wire_bytes


@dataclass(frozen=True)
class Comparison:
    link: Link
    num_hosts: int
    steps: int
    computed: bool  # times on the link are computed, not measured
    rows: list[Row]
    left_out: dict[str, str]  # method -> why
    rounds: list[dict[str, list[dict[str, Any]]]] = field(repr=False)  # per rank, as measured

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        return {
            "link": str(self.link),
            "hosts": self.num_hosts,
            "steps": self.steps,
            "cores_shared_by_all_hosts": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "tensors": NUM_TENSORS,
            "parameters": NUM_PARAMETERS,
            "times": "computed from counted bytes" if self.computed else "measured",
            "rows": [asdict(row) for row in self.rows],
            "left_out": self.left_out,
            "rounds": self.rounds,
        }


def compare(
    methods: Sequence[Method],
    link: Link,
    num_hosts: int = 2,
    steps: int = 5,
    *,
    threads: int = 1,
    use_lab: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Measures `methods` over `link`. `say` hears what is going on. Raises ConfigError and LabError."""
    if not 2 <= num_hosts <= lab.MAX_HOSTS:
        raise ConfigError(f"hosts: got {num_hosts}, wanted 2 to {lab.MAX_HOSTS}")
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"steps: got {steps}, wanted 1 to {MAX_STEPS}")
    running, left_out = _without_crashing(methods, say)
    dense_s = 8 * NUM_PARAMETERS * (num_hosts - 1) / num_hosts / link.payload_bytes_per_s
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(lab.lab(num_hosts, link)) if use_lab else lab.local(num_hosts)
        if use_lab:
            say(
                f"{steps} rounds of {len(running)} methods; one dense exchange alone takes {dense_s:.1f} s on this link"
            )
        arguments = {
            "methods": [method.to_json() for method in running],
            "steps": steps,
            "interface": lab.INTERFACE if use_lab else None,
            "timeout_s": 60.0 + 10 * dense_s,
        }
        rounds = launch.run(
            hosts,
            "distrobust.bench.step:measure",
            arguments,
            threads=threads,
            timeout_s=600.0 + 10 * dense_s * (steps + 4),
            heard=lambda rank, said: say(f"round {said['round']} of {steps}") if rank == 0 and said["round"] else None,
        )
    link_s = None if use_lab else link.payload_bytes_per_s
    return Comparison(link, num_hosts, steps, not use_lab, rows(running, rounds, link_s), left_out, rounds)


def rows(
    methods: Sequence[Method], rounds: list[dict[str, list[dict[str, Any]]]], computed_bytes_per_s: float | None = None
) -> list[Row]:
    """`rounds`: per rank, method and round, as `step.measure` returns. With `computed_bytes_per_s` the time that the
    payload takes at that rate is added to the seconds measured on loopback."""
    steps: dict[str, list[float]] = {}
    sent: dict[str, dict[str, float | None]] = {}
    for method in methods:
        by_round = list(zip(*(rank[method.name] for rank in rounds), strict=True))
        sent[method.name] = {
            key: _typical(by_round, key) for key in ("tcp_bytes", "wire_bytes", "packets", "counted_bytes")
        }
        on_link = (sent[method.name]["tcp_bytes"] or 0.0) / computed_bytes_per_s if computed_bytes_per_s else 0.0
        steps[method.name] = [max(record["seconds"] for record in ranks) + on_link for ranks in by_round]
    floor = statistics.median(steps[FLOOR]) if FLOOR in steps else 0.0
    made = []
    for method in methods:
        seconds, counts = steps[method.name], sent[method.name]
        lower, median, upper = (
            statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        )
        packets = counts["packets"]
        made.append(
            Row(
                method.name,
                median,
                lower,
                upper,
                median - floor,
                counts["tcp_bytes"] or 0.0,
                counts["wire_bytes"],
                None if packets is None else packets * HEADER_BYTES,
                counts["counted_bytes"],
            )
        )
    return made


def _typical(by_round: list[tuple[dict[str, Any], ...]], key: str) -> float | None:
    """Median over rounds of the mean over ranks; None where some rank has no count."""
    if any(record[key] is None for ranks in by_round for record in ranks):
        return None
    return statistics.median(statistics.fmean(record[key] for record in ranks) for ranks in by_round)


def _without_crashing(methods: Sequence[Method], say: Callable[[str], None]) -> tuple[list[Method], dict[str, str]]:
    """Tries the doubtful methods on loopback; those that fail are left out, with the reason."""
    running, left_out = [], {}
    for method in methods:
        if method.doubtful:
            say(f"trying {method.name}")
            try:
                arguments = {"method": method.to_json(), "timeout_s": _TRIAL_S}
                launch.run(lab.local(2), "distrobust.bench.step:trial", arguments, timeout_s=_TRIAL_S)
            except LabError as error:
                left_out[method.name] = textwrap.shorten(str(error), 160)
                continue
        running.append(method)
    return running, left_out


def command(
    link: str, num_hosts: int, steps: int, densities: str, values: str, threads: int, out: Path | None
) -> list[str]:
    """`distrobust bench step` with its arguments as they were typed; what to print on standard output."""
    methods = standard(parse_densities(densities), [code.strip() for code in values.split(",") if code.strip()])
    parsed = parse_link(link)
    reason = lab.why_not()
    if reason is not None:
        _to_stderr(f"{reason}; using processes over loopback instead, and computing the time on the link")
    compared = compare(methods, parsed, num_hosts, steps, threads=threads, use_lab=reason is None, say=_to_stderr)
    if out is not None:
        out.write_text(json.dumps(compared.to_json(), indent=1) + "\n")
    return table(compared)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(comparison: Comparison) -> list[str]:
    """The lines a person reads."""
    rows = comparison.rows
    dense = next((row for row in rows if row.name == DENSE), None)
    how = "computed from the bytes" if comparison.computed else "measured"
    header = ["method", "s/step", "quartiles", "- floor", "x faster", "MB sent", "MB on wire", "headers", "x fewer"]
    cells = [header]
    for row in rows:
        compared = dense is not None and row.name != FLOOR
        cells.append(
            [
                row.name,
                f"{row.median_s:.3f}",
                f"{row.lower_s:.3f} .. {row.upper_s:.3f}",
                "" if row.name == FLOOR else f"{row.minus_floor_s:.3f}",
                f"{dense.median_s / row.median_s:.1f}" if dense is not None and compared else "",
                f"{row.payload_bytes / 1e6:.3f}",
                "-" if row.wire_bytes is None else f"{row.wire_bytes / 1e6:.3f}",
                "-" if row.header_bytes is None else f"{row.header_bytes / 1e6:.3f}",
                f"{dense.heaviest_bytes / row.heaviest_bytes:,.0f}" if dense is not None and compared else "",
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [
        f"{NUM_TENSORS} tensors, {NUM_PARAMETERS:,} parameters (ResNet-50's shapes), {comparison.num_hosts} hosts, "
        f"{comparison.link}, {comparison.steps} rounds; times {how}",
        "",
    ]
    for name, *numbers in cells:
        columns = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        lines.append("  ".join(columns).rstrip())
    lines += ["", *_legend(comparison)]
    return lines


def _legend(comparison: Comparison) -> list[str]:
    lines = [
        "s/step: one backward pass through DDP with compression, exchange and decoding, no optimizer; median over "
        "rounds of the slowest rank.",
        "MB sent: payload per rank and step as TCP counts it, gloo's headers included.",
    ]
    if comparison.computed:
        lines.append("No lab: ranks were joined by loopback, and the time of the payload on the link was added.")
    else:
        lines.append("MB on wire: at the interface, packet headers (66 bytes each) and acknowledgements included.")
    lines += [f"Left out: {name}: {why}" for name, why in comparison.left_out.items()]
    return lines
