"""`distrobust simulate`: a configuration file -> a run directory with records and the final model, and a short table.

RUN/config.yaml         the resolved configuration
RUN/metrics.jsonl       one record a round, held-out accuracy every so often, a summary
RUN/models/global.pt    the model that clients have at the end, as `distrobust evaluate` reads it
RUN/scratch/            what clients keep between rounds and does not fit into memory; removed at the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrobust import __version__, models
from distrobust import config as configuration
from distrobust.errors import ConfigError, DataError
from distrobust.federated import checkpoint, dataset, evaluation
from distrobust.federated.buffered import Buffered
from distrobust.federated.rounds import run
from distrobust.federated.served import Served
from distrobust.federated.settings import SimulateConfig
from distrobust.federated.simulate import Simulation
from distrobust.federated.work import Worker, Workers
from distrobust.metrics import Fanout, jsonl
from distrobust.metrics.jsonl import JsonLines

Say = Callable[[str], None]
Elsewhere = Callable[[Worker], AbstractContextManager[Workers]]


def command(config: SimulateConfig, say: Say, on_actors: Elsewhere | None = None) -> bool:
    """Runs everything, or continues what was stopped; `say` gets the lines for the terminal. False if stopped again.

    on_actors: gives the work to execute.actors actors.
    """
    torch.set_num_threads(config.execute.threads)
    data = dataset.load(config)
    test = dataset.load_test(config, data.source)
    if len(data.source.shape) != 3:
        raise DataError(
            f"{config.data.path}: holds texts; simulated clients train on images, give a directory of those"
        )
    channels, height, width = data.source.shape
    mean, std, classes = [0.5] * channels, [0.25] * channels, data.source.num_classes
    module = models.build(config.model, classes, (channels, height, width), mean, std, seed=config.run.seed)
    directory = config.run.dir
    with _held(directory), _interrupt() as stopped, contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory / "scratch", ignore_errors=True)
        kind = Buffered if config.rounds.buffer is not None else Simulation
        simulation = stack.enter_context(kind(config, data, module, directory / "scratch"))
        if config.execute.actors is not None and on_actors is not None:
            simulation.workers = stack.enter_context(on_actors(simulation.worker))
        continued = checkpoint.load(simulation, directory)
        (directory / "config.yaml").write_text(configuration.dump(config))
        _forget_records(directory / "metrics.jsonl", simulation.round)
        records = stack.enter_context(Fanout(JsonLines(directory / "metrics.jsonl")))
        if config.metrics.port is not None:
            served = Served(directory, config.metrics)
            records.sinks = (*records.sinks, served)
            if served.notice:
                say(served.notice)
        records.write(begun(simulation))
        if continued:
            say(f"continues after round {simulation.round}")
        if simulation.network.fallback and config.execute.executor == "batched":
            say(f"one client after the other: {simulation.network.fallback}")
        table = _Table(config, simulation, say)
        started, first = time.perf_counter(), simulation.totals.updates

        def write(record: dict[str, Any]) -> None:
            records.write(record)
            table.show(record)

        def save() -> None:
            checkpoint.save(simulation, directory)

        if not run(simulation, data.held_out, write, save, stopped.is_set):
            say(f"stopped after round {simulation.round}, start again to continue")
            return False
        seconds = time.perf_counter() - started
        summary = _summary(simulation, test, (simulation.totals.updates - first) / seconds, seconds)
        records.write(summary)
        _save_model(config, simulation, data)
        (directory / checkpoint.NAME).unlink(missing_ok=True)
    for line in _lines(config, summary):
        say(line)
    return True


@contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C, so that the round in progress is finished; the second one is as usual."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _forget_records(path: Path, first_round: int) -> None:
    """Leaves the records of the rounds before `first_round`, which is where this start begins."""
    kept = (
        [record for record in jsonl.read(path) if record.get("round", first_round) < first_round]
        if path.exists()
        else []
    )
    path.unlink(missing_ok=True)
    records = JsonLines(path)
    for record in kept:
        records.write(record)
    records.close()


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
        heads = {"round": 6, "clock": 9, "loss": 7, "held-out": 9, "robust": 7, "updates": 8, "down MB": 9, "up MB": 9}
        say(" ".join(f"{head:>{width}}" for head, width in heads.items()))

    def show(self, record: dict[str, Any]) -> None:
        if record["event"] == "round":
            self._loss = record["loss"] if record["loss"] is not None else self._loss
            return
        totals, clock = self._simulation.totals, self._simulation.clock_s
        robust = f"{record['robust']:.1%}" if "robust" in record else "-"
        loss = "-" if self._loss is None else f"{self._loss:.4f}"
        self._say(
            f"{record['round'] + 1:>6} {clock:>7.0f} s {loss:>7} {record['clean']:>9.1%} {robust:>7} "
            f"{totals.updates:>8,} {totals.download_bytes / 1e6:>9.3f} {totals.upload_bytes / 1e6:>9.3f}"
        )


def begun(simulation: Simulation) -> dict[str, Any]:
    return {
        "event": "simulation",
        "time": time.time(),
        "num_clients": simulation.partition.num_clients,
        "num_parameters": simulation.network.spec.n,
        "first_round": simulation.round,
        "config": simulation.config.model_dump(mode="json"),
        "versions": {"distrobust": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _summary(simulation: Simulation, test: dataset.Rows, updates_per_s: float, host_s: float) -> dict[str, Any]:
    """updates_per_s, host_s: of this start."""
    totals = dataclasses.asdict(simulation.totals)
    personal, scores = simulation.personal(), simulation.accuracies(test)
    own = evaluation.of_clients(scores["clean"], simulation.class_shares())
    return {
        "event": "summary",
        "time": time.time(),
        "rounds": simulation.round,
        "clock_s": simulation.clock_s,
        "test": {name: dataclasses.asdict(one) for name, one in scores.items()},
        "client_quantiles": np.nanquantile(own, evaluation.QUANTILES).tolist(),
        "client_histogram": evaluation.histogram(own),
        "personal": dataclasses.asdict(personal) if personal is not None else None,
        "host_s": host_s,
        "updates_per_s": updates_per_s,
        "clients_with_state": max(len(simulation.residuals), len(simulation.controls)),
        "state_on_disk": simulation.residuals.is_on_disk or simulation.controls.is_on_disk,
        **totals,
    }


def _save_model(config: SimulateConfig, simulation: Simulation, data: dataset.Dataset) -> None:
    """In the form of the model files of `distrobust train`."""
    path = config.run.dir / "models/global.pt"
    path.parent.mkdir(exist_ok=True)
    content = {
        "model": config.model,
        "classes": list(data.source.class_names),
        "shape": list(data.source.shape),
        "column": data.source.column,
        "label_column": data.source.label_column,
        "state": simulation.module.state_dict(),
    }
    torch.save(content, path)


def _scores(test: dict[str, Any]) -> str:
    """With attack, seed, count, interval and flags, without which no robustness number is given."""
    return "; ".join(
        f"{one['attack']} {one['accuracy']:.1%} (95 % interval {one['low']:.1%} to {one['high']:.1%}, "
        f"n = {one['samples']}, seed {one['seed']}, flags: {', '.join(one['flags']) or 'none'})"
        for one in test.values()
    )


def _personal(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    each = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in found["accuracies"].items())
    return [f"on {found['rows']:,} own test rows of {found['clients']:,} clients: {each}"]


def _lines(config: SimulateConfig, summary: dict[str, Any]) -> list[str]:
    wasted = summary["wasted_download_bytes"] + summary["wasted_upload_bytes"]
    total = max(1, summary["download_bytes"] + summary["upload_bytes"])
    spent = {name: summary[f"{name}_s"] for name in ("compute", "download", "upload", "wait")}
    sum_s = sum(spent.values()) or 1.0
    times = ", ".join(f"{name} {seconds / sum_s:.0%}" for name, seconds in spent.items())
    left_out = ", ".join(f"{summary[name]:,} {name}" for name in ("late", "surplus", "lost", "nonfinite"))
    return [
        f"after {summary['rounds']} rounds, clock {summary['clock_s']:.0f} s, on the test rows: "
        + _scores(summary["test"]),
        *_personal(summary["personal"]),
        f"{summary['updates']:,} updates counted; not counted: {left_out}",
        f"{summary['download_bytes'] / 1e6:.3f} MB down, {summary['upload_bytes'] / 1e6:.3f} MB up, "
        f"{wasted / total:.1%} of it wasted; clients' time: {times}",
        f"simulated in {summary['host_s']:.1f} s, {summary['updates_per_s']:,.0f} client updates a second; "
        f"records: {config.run.dir / 'metrics.jsonl'}",
    ]
