"""Measuring this machine: bench step, bench crossover."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.group()
def bench() -> None:
    """Measure what compression is worth on this machine, across a slow link made on it."""


_DENSITIES = click.option(
    "--densities", default="0.01,0.001", show_default=True, help="Shares of the coordinates sent."
)
_THREADS = click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="torch threads per host."
)
_OUT = click.option("--out", type=click.Path(path_type=Path), help="Also write everything measured, as JSON.")


@bench.command()
@click.option("--link", default="100mbit", show_default=True, help="Bandwidth between hosts: 10mbit, 1gbit, ...")
@click.option("--hosts", default=2, show_default=True, type=click.IntRange(2, 64), help="Simulated on this machine.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(1, 10_000), help="Steps of every method.")
@_DENSITIES
@click.option("--values", default="", help="Value codes, such as 4bit,fp16; empty: the default one.")
@_THREADS
@_OUT
def step(link: str, hosts: int, steps: int, densities: str, values: str, threads: int, out: Path | None) -> None:
    """Time and bytes of a step for dense, 16-bit, PowerSGD and distrobust, ResNet-50's shapes.

    Hosts are network namespaces on this machine (root or user namespaces); where that is not allowed, processes over
    loopback, whose time on the link is computed.
    """
    from distrobust.bench import comparison

    for line in comparison.command(link, hosts, steps, densities, values, threads, out):
        click.echo(line)


@bench.command()
@click.option("--bandwidth", default="100mbit", show_default=True, help="Of every worker's link, each way.")
@click.option("--latency", default="1ms", show_default=True, help="From one worker to another.")
@_DENSITIES
@click.option("--values", default="", help="Value code, such as 4bit; empty: the default one.")
@click.option("--parameters", default=25_557_032, show_default=True, type=click.IntRange(1), help="Of the model.")
@click.option("--lab", is_flag=True, help="Also measure steps on hosts made here, and compare the model with them.")
@click.option("--hosts", default="2,4,8", show_default=True, help="Numbers of hosts of the lab.")
@click.option("--steps", default=3, show_default=True, type=click.IntRange(1, 1000), help="Steps of each in the lab.")
@_THREADS
@click.option("--plot", type=click.Path(path_type=Path), help="Draw both to this .png, .svg or .pdf.")
@_OUT
def crossover(bandwidth: str, latency: str, densities: str, lab: bool, **others: Any) -> None:
    """For how many workers, on which link, is a compressed step faster than a dense or 16-bit one?

    Compression and decoding are timed on this machine; step times for 2 to 1024 workers are computed from them and
    the link. With --lab the same is measured for a few hosts, to see how far the computation can be trusted.
    """
    from distrobust.bench import crossing

    for line in crossing.command(bandwidth, latency, densities, in_lab=lab, **others):
        click.echo(line)


COMMANDS = (bench,)
