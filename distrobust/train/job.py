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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distrobust import __version__, data
from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.comm.transport import Transport
from distrobust.config import Config, DataConfig, PhaseConfig
from distrobust.data import Shard, Source
from distrobust.errors import CommError, ConfigError, DataError, DistrobustError
from distrobust.metrics import Fanout, OptionalSink, Sink, jsonl, tensorboard, weights_and_biases
from distrobust.metrics.jsonl import JsonLines
from distrobust.metrics.prometheus import Exporter
from distrobust.optim.schedules import Schedule, batch_factor
from distrobust.train import checkpoint, interface, logs, loop, scoring, stall, transfer
from distrobust.train.checkpoint import Position
from distrobust.train.faults import Faults
from distrobust.train.modelfile import (
    Architecture,
    Start,
    build_model,
    load_model_file,
    save_model_file,
    starting_model,
)
from distrobust.train.rundir import Outcome, RunDirectory
from distrobust.train.state import TrainState, make_state
from distrobust.train.step import Recipe, ball, replays
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
            exporter = _exporter(config, directory)
            sinks = Fanout(*_curves(config, directory), *([exporter] if exporter else []), *extra_sinks)
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
        source, test = self._on_all_ranks(self._describe)
        train_rows, held_out_rows = data.split_held_out(source, self.config.data.held_out, self.config.run.seed)
        train = self._on_all_ranks(lambda: self._shard(source, rank, num_ranks, train_rows))
        held_out = self._on_all_ranks(lambda: self._shard(source, rank, num_ranks, held_out_rows))
        start = self._on_all_ranks(lambda: self._start(source))
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
            self._evaluate(test, architecture, source, rank, num_ranks)
        self._emit({"event": "done", "seconds": time.perf_counter() - started})
        return Outcome("done")

    def _describe(self) -> tuple[Source, Source]:
        settings = self.config.data
        source = describe_training(settings)
        return source, data.describe(
            settings.path,
            "test",
            image_column=settings.image_column,
            text_column=settings.text_column,
            label_column=settings.label_column,
            channels=None if source.is_text else source.shape[0],
            length=settings.length,
            classes=source.class_names,
        )

    def _shard(self, source: Source, rank: int, num_ranks: int, rows: data.Selection | None) -> Shard:
        settings = self.config.data
        return Shard(
            source,
            rank,
            num_ranks,
            self.config.run.seed,
            cache=settings.cache,
            memory_limit_bytes=settings.memory_limit_bytes,
            rows=rows,
        )

    def _start(self, source: Source) -> Start:
        start = starting_model(self.config.model, source, self.config.run.seed)
        if rates := self.config.model.rates:  # wrong patterns are found before pre-training, not after it
            text = f"train: {transfer.describe(start.net, transfer.multipliers(start.net, rates))}"
            start = dataclasses.replace(start, notices=(*start.notices, text))
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
        )

    def _export(self, net: nn.Module, name: str, architecture: Architecture, source: Source) -> None:
        """net: the same on every rank."""
        if dist.get_rank() == 0:
            save_model_file(self._model_path(name), net, architecture, source)
        Transport().gather_rows(torch.zeros(1))  # no rank reads it before it is there

    def _model_path(self, name: str) -> Path:
        return self.directory.models / f"{name}.pt"

    def _model_before(self) -> Path | None:
        """The model file of before the fine-tuning; None if that started from random weights."""
        written = self.config.pretrain is not None or self._starts_from_directory
        return self._model_path("pre-trained") if written else self.config.model.weights

    @property
    def _starts_from_directory(self) -> bool:
        model = self.config.model
        return model.directory is not None and model.weights is None and self.config.pretrain is None

    def _evaluate(self, test: Source, architecture: Architecture, source: Source, rank: int, num_ranks: int) -> None:
        """Clean and PGD accuracy on the test file, of the model before and after fine-tuning."""
        settings, attack = self.config.evaluate, self.config.attack
        shard = self._on_all_ranks(lambda: self._shard(test, rank, num_ranks, None))
        attacks: list[tuple[Attack, Threat | None, int]] = [(scoring.NATURAL, None, 0)]
        if attack is not None:
            eps = attack.eps if settings.eps is None else settings.eps
            threat = ball(attack.norm, eps, self.config.model.reads_text)
            attacks.append((Attack("pgd", steps=settings.steps), threat, settings.images))
        models = {"pre-trained": self._model_before(), "fine-tuned": self._model_path("fine-tuned")}
        if self.config.train.patience is not None:
            models["fine-tuned" + BEST] = self._model_path("fine-tuned" + BEST)
        for label, path in models.items():
            if path is None:
                continue
            net = build_model(architecture, source, self.config.run.seed).to(self.device)
            self._on_all_ranks(partial(load_model_file, net, path))
            net.eval()
            for chosen, within, limit in attacks:
                result = scoring.distributed_score(
                    net,
                    shard,
                    chosen,
                    within,
                    limit=limit,
                    batch_size=settings.batch_size,
                    seed=self.config.run.seed,
                    transport=Transport(),
                    beat=self.beat,
                )
                self._emit(
                    {
                        "event": "evaluation",
                        "model": label,
                        "attack": result.attack,
                        "accuracy": result.accuracy,
                        "low": result.low,
                        "high": result.high,
                        "samples": result.samples,
                        "seed": result.seed,
                        "seconds": result.seconds,
                        "flags": list(result.flags),
                    }
                )

    def _emit(self, record: dict[str, Any]) -> None:
        try:
            self.sinks.write({"event": record["event"], "time": time.time(), **record})
        except OSError as error:  # a full disk: numbers are lost, the run is not
            _log.error("a record was not written: %s", error)

    def _on_all_ranks(self, work: Callable[[], Any]) -> Any:
        """Does `work` on every rank; an error on one becomes the same error on all, instead of a wait for a timeout."""
        result: Any = None
        mine: DistrobustError | None = None
        try:
            result = work()
        except DistrobustError as error:
            mine = error
        except OSError as error:
            mine = DataError(f"rank {dist.get_rank()}: {error.filename or 'a file'}: {error.strerror}")
        everyone: list[DistrobustError | None] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(everyone, mine)
        except RuntimeError as error:
            raise CommError(Transport().explain(error)) from error
        first = next((error for error in everyone if error is not None), None)
        if first is not None:
            raise first
        return result


def describe_training(settings: DataConfig) -> Source:
    """The training split."""
    return data.describe(
        settings.path,
        "train",
        image_column=settings.image_column,
        text_column=settings.text_column,
        label_column=settings.label_column,
        length=settings.length,
    )


def _earlier_starts(directory: RunDirectory) -> int:
    if not directory.metrics.exists():
        return 0
    return sum(record["event"] == "run" for record in jsonl.read(directory.metrics))


def _curves(config: Config, directory: RunDirectory) -> list[Sink]:
    """Rank 0's files of records. ConfigError on every rank alike where one of them needs what is not installed."""
    settings = config.metrics
    if settings.tensorboard:
        tensorboard.require()
    if settings.wandb is not None:
        weights_and_biases.require(settings.wandb)
    if dist.get_rank() != 0:
        return []
    sinks: list[Sink] = [JsonLines(directory.metrics)]
    if settings.tensorboard:
        sinks.append(OptionalSink("metrics.tensorboard", tensorboard.TensorBoard(directory.tensorboard)))
    if settings.wandb is not None:
        kept = weights_and_biases.WeightsAndBiases(settings.wandb, directory.path)
        sinks.append(OptionalSink("metrics.wandb", kept))
    return sinks


def _exporter(config: Config, directory: RunDirectory) -> Exporter | None:
    if config.metrics.port is None:
        return None
    rank = dist.get_rank()
    exporter = Exporter(
        directory.path.name,
        rank,
        host=config.metrics.host,
        port=config.metrics.port,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        file_sd=directory.targets,
        linger_s=config.metrics.linger_s,
    )
    if exporter.notice:
        _log.warning(exporter.notice)
    return exporter
