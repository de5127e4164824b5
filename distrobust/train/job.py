"""The train function: what every rank of a run does, whoever launched it.

The process group exists already. Natural pre-training (optional), adversarial fine-tuning, evaluation of both models.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distrobust import __version__, data
from distrobust.comm.transport import Transport
from distrobust.config import Config, PhaseConfig
from distrobust.data import Shard, Source
from distrobust.errors import CommError, ConfigError, DistrobustError
from distrobust.metrics import Fanout, Sink, jsonl
from distrobust.optim.schedules import Schedule, batch_factor
from distrobust.train import (
    before_and_after,
    checkpoint,
    interface,
    logs,
    loop,
    outputs,
    scoring,
    sources,
    stall,
    transfer,
)
from distrobust.train.agree import on_all_ranks
from distrobust.train.checkpoint import Position
from distrobust.train.faults import Faults
from distrobust.train.modelfile import (
    Architecture,
    Start,
    build_model,
    save_model_file,
    starting_model,
)
from distrobust.train.rundir import Outcome, RunDirectory
from distrobust.train.state import TrainState, make_state
from distrobust.train.step import Recipe, replays
from distrobust.train.stopping import stop_requests

_log = logging.getLogger(__name__)

PHASES = ("pretrain", "train")
MODEL_NAMES = {"pretrain": "pre-trained", "train": "fine-tuned"}
BEST = "-best"  # after a model's name: that of the epoch with the highest held-out accuracy


def run(config: Config, device: torch.device, extra_sinks: list[Sink]) -> Outcome:
    """Runs or continues the job on this rank. Rank 0 writes the outcome into the run directory.

    Errors a user can mend end all ranks alike and are returned in the outcome; what another start may
    mend (a dead peer) is raised, for the launcher to start again.
    """
    torch.set_num_threads(config.cluster.threads)
    directory = RunDirectory(config.run.dir)
    earlier = directory.outcome()
    if earlier is not None and earlier.status == "failed":
        return earlier  # restarted after an error that a restart does not mend
    sinks, rank = Fanout(), dist.get_rank()
    try:
        with (
            logs.kept(directory.logs, rank),
            stall.named(directory.stacks),
            stall.watched(directory.stacks, rank, config.cluster.timeout_s / 2) as watch,
            stop_requests(directory) as stop_requested,
        ):
            starts = _earlier_starts(directory)
            sinks = Fanout(*outputs.files(config, directory))
            exporter = outputs.exporter(config, directory)
            sinks = Fanout(*sinks.sinks, *([exporter] if exporter else []), *extra_sinks)
            notices = [exporter.notice] if exporter and exporter.notice else []
            outcome = _Job(config, device, directory, sinks, stop_requested, starts, notices, watch.beat).run()
    except CommError:
        raise
    except (DistrobustError, OSError) as error:
        outcome = Outcome("failed", type(error).__name__, str(error))
        directory.write_outcome(outcome)  # by whichever rank met it: the others may still wait for it
        return outcome
    finally:
        sinks.close()
    if rank == 0:
        directory.write_outcome(outcome)
    return outcome


@dataclass
class _Job:
    config: Config
    device: torch.device
    directory: RunDirectory
    sinks: Sink
    stop_requested: Callable[[], bool]
    earlier_starts: int
    notices: list[str]
    beat: Callable[[], None]

    def run(self) -> Outcome:
        started = time.perf_counter()
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        source, test = on_all_ranks(lambda: sources.describe(self.config.data))
        train_rows, held_out_rows = data.split_held_out(source, self.config.data.held_out, self.config.run.seed)
        train = on_all_ranks(lambda: sources.shard(self.config, source, rank, num_ranks, train_rows))
        held_out = on_all_ranks(lambda: sources.shard(self.config, source, rank, num_ranks, held_out_rows))
        start = on_all_ranks(lambda: self._start(source))
        net, architecture = start.net, start.architecture

        def export(net: nn.Module, name: str) -> None:
            self._export(net, name, architecture, source)

        phases = [self._phase(name, train, held_out, export) for name in PHASES]
        restored = checkpoint.load(self.directory.checkpoints, Transport())
        self._emit(
            {
                "event": "run",
                "pid": os.getpid(),
                "world_size": num_ranks,
                "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
                "config": self.config.model_dump(mode="json"),
                "versions": {
                    "distrobust": __version__,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                },
                "interface": os.environ.get(interface.VARIABLES[0]),  # of rank 0; null: gloo's own choice
                "restarts": self.earlier_starts,
                "resumed_step": restored.position.step if restored else 0,
                "resumed_phase": restored.position.phase if restored else None,
            }
        )
        for text in [*self.notices, *start.notices, *(restored.notices if restored else ())]:
            self._emit({"event": "notice", "text": text})
        if self._starts_from_directory and restored is None:
            export(scoring.averaged(net, Transport()), MODEL_NAMES["pretrain"])  # evaluated beside the fine-tuned model
        for ordinal, (name, phase) in enumerate(zip(PHASES, phases, strict=True)):
            if phase is None or (restored is not None and restored.position.ordinal > ordinal):
                continue
            state = self._state(net, Position(ordinal, name, 0), phase)
            if restored is not None and restored.position.ordinal == ordinal:
                state.load(restored)
            _log.info("%s from step %d of %d, %d ranks", name, state.position.step, phase.recipe.num_steps, num_ranks)
            self._emit(
                {
                    "event": "phase",
                    "phase": name,
                    "num_steps": phase.recipe.num_steps,
                    "steps_per_epoch": phase.steps_per_epoch,
                    "num_epochs": phase.settings.epochs,
                }
            )
            ended = loop.run_phase(state, phase)
            if ended is not loop.End.COMPLETE:
                place = f"{name}, step {state.position.step} of {phase.recipe.num_steps}"
                saved = "a checkpoint was" if ended is loop.End.SAVED else "no checkpoint could be"
                return Outcome("stopped", text=f"{place}; {saved} written")
            state.adopt_average()
            export(scoring.averaged(net, Transport()), MODEL_NAMES[name])
        if self.config.evaluate.test:

            def make() -> nn.Module:
                return build_model(architecture, source, self.config.run.seed).to(self.device)

            before_and_after.evaluate(self.config, self._models(), make, test, self._emit, self.beat)
        self._emit({"event": "done", "seconds": time.perf_counter() - started})
        return Outcome("done")

    def _start(self, source: Source) -> Start:
        start = starting_model(self.config.model, source, self.config.run.seed)
        if rates := self.config.model.rates:  # wrong patterns are found before pre-training, not after it
            text = f"train: {transfer.describe(start.net, transfer.multipliers(start.net, rates))}"
            start = dataclasses.replace(start, notices=(*start.notices, text))
        if self._steps_ahead_from_random_weights:
            text = "train: step-ahead from random weights without a warm-up ends differently for every seed; set"
            start = dataclasses.replace(start, notices=(*start.notices, f"{text} compress.warmup to 0.2, or pretrain"))
        if self.config.model.channels_last:
            scoring.to_memory_format(start.net, torch.channels_last)
        start.net.to(self.device)
        return start

    def _phase(
        self, name: str, train: Shard, held_out: Shard, export: Callable[[nn.Module, str], None]
    ) -> loop.Phase | None:
        """None for a phase that is not configured; raises ConfigError for one that cannot be run on this data."""
        config, tuning = self.config, name == "train"
        settings: PhaseConfig | None = getattr(config, name)
        if settings is None:
            return None
        schedule = self._schedule(name, settings)
        try:
            num_batches = settings.epochs * train.num_steps(settings.batch_size)
        except ConfigError as error:
            raise ConfigError(f"{name}.batch_size: {error}") from None
        share = settings.batch_size // train.world_size
        if settings.accumulate > share:
            raise ConfigError(
                f"{name}.accumulate: {settings.accumulate}, wanted at most a rank's {share} images a step"
            )
        attack = config.attack if tuning else None
        recipe = Recipe(
            phase=settings,
            attack=attack,
            schedule=schedule,
            num_steps=num_batches * replays(attack),
            crop=config.data.crop,
            flip=config.data.flip,
            seed=config.run.seed,
            channels_last=config.model.channels_last,
            of_text=config.model.reads_text,
        )
        return loop.Phase(
            config,
            settings,
            recipe,
            train,
            held_out,
            self.directory,
            self._emit,
            self.stop_requested,
            lambda net: export(net, MODEL_NAMES[name] + BEST),
            self.beat,
            faults=self._faults(train.rank),
        )

    def _faults(self, rank: int) -> Faults | None:
        planned = self.config.faults
        return Faults(planned, rank, self.directory.faults, checkpoint.write) if planned else None

    def _schedule(self, name: str, settings: PhaseConfig) -> Schedule:
        """With the peak scaled to the batch size, if it was tuned for another."""
        given = settings.schedule
        schedule = Schedule(**given.model_dump(exclude={"tuned_for", "scaling"}))
        if given.tuned_for is None or given.tuned_for == settings.batch_size:
            return schedule
        factor = batch_factor(settings.batch_size, given.tuned_for, given.scaling)
        peak = schedule.peak * factor
        text = f"batch size {settings.batch_size}, {given.tuned_for} when it was tuned ({given.scaling} scaling)"
        self._emit({"event": "notice", "text": f"{name}: learning rate times {factor:.4g}, peak {peak:.4g}: {text}"})
        return dataclasses.replace(schedule, peak=peak)

    def _state(self, net: nn.Module, position: Position, phase: loop.Phase) -> TrainState:
        tuning = position.phase == "train"
        return make_state(
            net,
            position,
            phase.settings,
            self.config.compress if tuning else None,
            self.config.noise if tuning else None,
            phase.recipe.num_steps,
            Transport(),
            self.device,
            self.config.model.rates if tuning else None,
            may_resize=self.config.cluster.min_workers is not None,
        )

    def _export(self, net: nn.Module, name: str, architecture: Architecture, source: Source) -> None:
        """net: the same on every rank."""
        if dist.get_rank() == 0:
            save_model_file(self._model_path(name), net, architecture, source)
        Transport().gather_rows(torch.zeros(1))  # no rank reads it before it is there

    def _model_path(self, name: str) -> Path:
        return self.directory.models / f"{name}.pt"

    def _models(self) -> dict[str, Path]:
        """The model files of before the fine-tuning, unless that started from random weights, and after it."""
        written = self.config.pretrain is not None or self._starts_from_directory
        before = self._model_path("pre-trained") if written else self.config.model.weights
        models = {} if before is None else {"pre-trained": before}
        models["fine-tuned"] = self._model_path("fine-tuned")
        if self.config.train.patience is not None:
            models["fine-tuned" + BEST] = self._model_path("fine-tuned" + BEST)
        return models

    @property
    def _starts_from_directory(self) -> bool:
        model = self.config.model
        return model.directory is not None and model.weights is None and self.config.pretrain is None

    @property
    def _steps_ahead_from_random_weights(self) -> bool:
        model, compress = self.config.model, self.config.compress
        is_random = model.directory is None and model.weights is None and self.config.pretrain is None
        return is_random and compress is not None and compress.step_ahead and not compress.warmup

    def _emit(self, record: dict[str, Any]) -> None:
        try:
            self.sinks.write({"event": record["event"], "time": time.time(), **record})
        except OSError as error:  # a full disk: numbers are lost, the run is not
            _log.error("a record was not written: %s", error)


def _earlier_starts(directory: RunDirectory) -> int:
    if not directory.metrics.exists():
        return 0
    return sum(record["event"] == "run" for record in jsonl.read(directory.metrics))
