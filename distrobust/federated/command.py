"""`distrobust simulate`: a configuration file -> a run directory with records and the final model, and a short table.

RUN/config.yaml         the resolved configuration
RUN/metrics.jsonl       one record a round, held-out accuracy every so often, a summary
RUN/models/global.pt    the model that clients have at the end, as `distrobust evaluate` reads it
RUN/scratch/            what clients keep between rounds and does not fit into memory; removed at the end
"""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distrobust import config as configuration
from distrobust import models
from distrobust.errors import ConfigError
from distrobust.federated import dataset
from distrobust.federated.settings import SimulateConfig
from distrobust.federated.simulate import Simulation, run
from distrobust.metrics.jsonl import JsonLines

Say = Callable[[str], None]


def command(config: SimulateConfig, say: Say) -> None:
    """Runs everything; `say` gets the lines for the terminal. Starts afresh: earlier records are replaced."""
    torch.set_num_threads(config.execute.threads)
    data = dataset.load(config)
    test = dataset.load_test(config, data.source)
    shape = data.source.shape
    mean, std = [0.5] * shape[0], [0.25] * shape[0]
    module = models.build(config.model, data.source.num_classes, shape, mean, std, seed=config.run.seed)
    with _held(config.run.dir):
        (config.run.dir / "config.yaml").write_text(configuration.dump(config))
        (config.run.dir / "metrics.jsonl").unlink(missing_ok=True)
        records = JsonLines(config.run.dir / "metrics.jsonl")
        scratch = config.run.dir / "scratch"
        try:
            with Simulation(config, data, module, scratch) as simulation:
                if simulation.network.fallback and config.execute.executor == "batched":
                    say(f"batched by torch.func.vmap: {simulation.network.fallback}")
                started = time.perf_counter()
                table = _Table(config, simulation, say)

                def write(record: dict[str, Any]) -> None:
                    records.write(record)
                    table.show(record)

                run(simulation, data.held_out, write)
                summary = _summary(simulation, simulation.accuracy(test).accuracy, time.perf_counter() - started)
                records.write(summary)
                _save(config, simulation, data)
        finally:
            records.close()
            shutil.rmtree(scratch, ignore_errors=True)
    for line in _lines(config, summary):
        say(line)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Keeps every other start out, and away from the directories of other commands."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir {directory}: cannot be created ({error.strerror}); set run.dir") from None
    if (directory / "checkpoints").exists():
        raise ConfigError(f"run.dir {directory} holds a run of `distrobust train`; set run.dir to another directory")
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"run.dir {directory} is in use by another start; wait for it, or set run.dir") from None
        yield


class _Table:
    """One line a look at the held-out rows."""

    def __init__(self, config: SimulateConfig, simulation: Simulation, say: Say) -> None:
        self._simulation, self._say, self._loss = simulation, say, None
        num_clients, n = simulation.partition.num_clients, simulation.network.spec.n
        say(
            f"{num_clients:,} clients, {config.clients.per_round} a round, {config.clients.partition}; "
            f"{config.model} of {n:,} parameters"
        )
        say(f"{'round':>6} {'clock':>9} {'loss':>7} {'held-out':>9} {'updates':>8} {'down MB':>9} {'up MB':>9}")

    def show(self, record: dict[str, Any]) -> None:
        if record["event"] == "round":
            self._loss = record["loss"] if record["loss"] is not None else self._loss
            return
        totals, clock = self._simulation.totals, self._simulation.clock_s
        loss = "-" if self._loss is None else f"{self._loss:.4f}"
        self._say(
            f"{record['round'] + 1:>6} {clock:>7.0f} s {loss:>7} {record['clean']:>8.1%} {totals.updates:>8,} "
            f"{totals.download_bytes / 1e6:>9.3f} {totals.upload_bytes / 1e6:>9.3f}"
        )


def _summary(simulation: Simulation, test_accuracy: float, host_s: float) -> dict[str, Any]:
    totals = dataclasses.asdict(simulation.totals)
    return {
        "event": "summary",
        "time": time.time(),
        "rounds": simulation.round,
        "clock_s": simulation.clock_s,
        "test": test_accuracy,
        "host_s": host_s,
        "updates_per_s": totals["updates"] / host_s,
        "clients_with_state": max(len(simulation.residuals), len(simulation.controls)),
        "state_on_disk": simulation.residuals.is_on_disk or simulation.controls.is_on_disk,
        **totals,
    }


def _save(config: SimulateConfig, simulation: Simulation, data: dataset.Dataset) -> None:
    """In the form of the model files of `distrobust train`."""
    path = config.run.dir / "models/global.pt"
    path.parent.mkdir(exist_ok=True)
    content = {
        "model": config.model,
        "classes": list(data.source.class_names),
        "shape": list(data.source.shape),
        "state": simulation.module.state_dict(),
    }
    torch.save(content, path)


def _lines(config: SimulateConfig, summary: dict[str, Any]) -> list[str]:
    wasted = summary["wasted_download_bytes"] + summary["wasted_upload_bytes"]
    total = max(1, summary["download_bytes"] + summary["upload_bytes"])
    spent = {name: summary[f"{name}_s"] for name in ("compute", "download", "upload", "wait")}
    sum_s = sum(spent.values()) or 1.0
    times = ", ".join(f"{name} {seconds / sum_s:.0%}" for name, seconds in spent.items())
    left_out = ", ".join(f"{summary[name]:,} {name}" for name in ("late", "surplus", "lost", "nonfinite"))
    return [
        f"test accuracy {summary['test']:.1%} after {summary['rounds']} rounds, clock {summary['clock_s']:.0f} s",
        f"{summary['updates']:,} updates counted; not counted: {left_out}",
        f"{summary['download_bytes'] / 1e6:.3f} MB down, {summary['upload_bytes'] / 1e6:.3f} MB up, "
        f"{wasted / total:.1%} of it wasted; clients' time: {times}",
        f"simulated in {summary['host_s']:.1f} s, {summary['updates_per_s']:,.0f} client updates a second; "
        f"records: {config.run.dir / 'metrics.jsonl'}",
    ]
