"""One phase of a run: steps, records, the ranks' heartbeat, accuracy after each epoch, checkpoints."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn

from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.config import AttackConfig, Config, PhaseConfig
from distrobust.data import Shard
from distrobust.errors import DivergedError
from distrobust.evaluation.accuracy import Score
from distrobust.optim.rates import mean_by_layer, norm_by_layer
from distrobust.train import checkpoint, scoring
from distrobust.train.checkpoint import Retries
from distrobust.train.faults import Faults
from distrobust.train.rundir import RunDirectory
from distrobust.train.slow import slow_ranks
from distrobust.train.state import Best, TrainState
from distrobust.train.step import Recipe, StepResult, ball, replays, train_step

_log = logging.getLogger(__name__)

Emit = Callable[[dict[str, Any]], None]

EPOCH_ATTACK = Attack("pgd", steps=10)
WATCH_IMAGES = 256


@dataclass
class _Window:
    """What happened since the last record, on this rank."""

    results: list[StepResult] = field(default_factory=list)
    hook_s: float = 0.0
    decode_s: float = 0.0

    @staticmethod
    def begin(state: TrainState) -> _Window:
        return _Window(hook_s=state.compression.seconds, decode_s=state.compression.decode_seconds)


@dataclass(frozen=True)
class Phase:
    """What a phase needs besides its state."""

    config: Config
    settings: PhaseConfig
    recipe: Recipe
    train: Shard
    held_out: Shard
    directory: RunDirectory
    emit: Emit
    stop_requested: Callable[[], bool]
    keep_best: Callable[[nn.Module], None]
    """Called on every rank with the best model so far, if the phase stops early."""
    beat: Callable[[], None]
    """Called whenever this rank gets on (stall.py)."""
    faults: Faults | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.train.num_steps(self.settings.batch_size) * replays(self.recipe.attack)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of an epoch's steps from `first` on."""
        num = replays(self.recipe.attack)
        done = first % num
        for images, labels in self.train.batches(epoch, self.settings.batch_size, first // num):
            for _ in range(done, num):
                yield images, labels
            done = 0


class End(Enum):
    """How a phase ended: COMPLETE, or stopped on request with a checkpoint SAVED, or UNSAVED because writing failed."""

    COMPLETE = auto()
    SAVED = auto()
    UNSAVED = auto()


def run_phase(state: TrainState, phase: Phase) -> End:
    """Runs `state` to the end of its phase, or to a stop request.

    Every rank makes the same decisions at the same steps. Raises DivergedError when ranks' parameters differ, or after
    too many skipped steps in a row.
    """
    phase.emit({"event": "activity", "phase": state.position.phase, "training": 1})
    end = _run_steps(state, phase)
    phase.emit({"event": "activity", "phase": state.position.phase, "training": 0})
    return end


def _run_steps(state: TrainState, phase: Phase) -> End:
    per_epoch, total = phase.steps_per_epoch, phase.recipe.num_steps
    window = _Window.begin(state)
    device = next(state.net.parameters()).device
    while state.position.step < total and not _is_over(state, phase):
        epoch, first = divmod(state.position.step, per_epoch)
        for images, labels in phase.batches(epoch, first):
            if phase.faults is not None:
                phase.faults.before_step(state)
            result = train_step(state, images.to(device), labels.to(device), phase.recipe, phase.train.rank)
            state.position = dataclasses.replace(state.position, step=state.position.step + 1)
            state.samples += phase.settings.batch_size
            window.results.append(result)
            phase.beat()
            _check_skipped(state, phase)
            step = state.position.step
            at_epoch_end, stop = step % per_epoch == 0, False
            if step % phase.config.metrics.every == 0 or at_epoch_end:
                stop = _heartbeat(state, phase, window)
                window = _Window.begin(state)
            attack = phase.recipe.attack
            if attack is not None and (at_epoch_end or step % (attack.watch_every or per_epoch) == 0):
                _watch(state, phase, attack)
            if at_epoch_end:
                _score_epoch(state, phase)
            saved = True
            if stop or at_epoch_end or step % (phase.config.checkpoint.every or per_epoch) == 0:
                saved = save(state, phase)
            if stop and step < total:
                return End.SAVED if saved else End.UNSAVED
    return End.COMPLETE


def save(state: TrainState, phase: Phase) -> bool:
    """A checkpoint at the state's position. A failure is reported, returns False, and training goes on.

    Raises DivergedError, writing nothing, when ranks' parameters differ.
    """
    started = time.perf_counter()
    transport, settings = state.transport, phase.config.checkpoint
    _check_digests(state, phase, transport.gather_rows(parameter_digest(state).view(1))[:, 0])
    written = checkpoint.save(
        phase.directory.checkpoints,
        state.position,
        state.shared(),
        state.own(),
        transport,
        settings.keep,
        Retries(settings.retries, settings.backoff_s),
        checkpoint.write if phase.faults is None else phase.faults.write,
    )
    if written.notice:
        phase.emit({"event": "notice", "text": written.notice})
    if problem := written.problem:
        state.failed_checkpoints += 1
        phase.emit({"event": "notice", "text": problem})
        phase.emit(
            {
                "event": "checkpoint_failed",
                "phase": state.position.phase,
                "step": state.position.step,
                "failures": state.failed_checkpoints,
            }
        )
        _log.error(problem)
        return False
    phase.emit(
        {
            "event": "checkpoint",
            "phase": state.position.phase,
            "step": state.position.step,
            "seconds": time.perf_counter() - started,
            "bytes": checkpoint.size_bytes(phase.directory.checkpoints, state.position),
        }
    )
    return True


def parameter_digest(state: TrainState) -> Tensor:
    """One int64 of all parameters' bits: equal on replicas that are equal, different after any single flipped bit."""
    total = torch.zeros((), dtype=torch.int64)
    for index, parameter in enumerate(state.net.parameters()):
        bits = parameter.detach().contiguous().view(torch.int32).to(torch.int64).sum()
        total += bits.cpu() * (2 * index + 1)
    return total


def _check_skipped(state: TrainState, phase: Phase) -> None:
    limit, count = phase.settings.max_skipped_steps, state.compression.skipped_in_a_row
    if count >= limit:
        raise DivergedError(
            f"{state.position.phase}, step {state.position.step}: non-finite gradients {count} steps in a row; "
            f"lower {state.position.phase}.schedule.peak or look at the data; the last checkpoint is kept"
        )


def _heartbeat(state: TrainState, phase: Phase, window: _Window) -> bool:
    """Exchanges 48 bytes a rank: loss, accuracy, a digest of the parameters, the time of its own part of a step and
    whether someone was asked to stop."""
    transport = state.transport
    results = window.results
    samples = sum(result.samples for result in results)
    loss = sum((result.loss.double() * result.samples for result in results), torch.zeros((), dtype=torch.float64))
    correct = sum((result.correct.double() for result in results), torch.zeros((), dtype=torch.float64))
    numbers = torch.stack([loss.cpu(), correct.cpu()]).view(torch.int64)
    own_s = torch.tensor([sum(result.own_s for result in results) / len(results)], dtype=torch.float64)
    counts = torch.tensor([samples, phase.stop_requested()])
    row = torch.cat([numbers, counts, parameter_digest(state).view(1), own_s.view(torch.int64)])
    rows = transport.gather_rows(row.to(next(state.net.parameters()).device)).cpu()
    _check_digests(state, phase, rows[:, 4])
    _report_slow(state, phase, rows[:, 5].contiguous().view(torch.float64).tolist())
    sums = rows[:, :2].contiguous().view(torch.float64).sum(dim=0)
    count = int(rows[:, 2].sum())
    last, step = results[-1], state.position.step
    compression = state.compression
    phase.emit(
        {
            "event": "step",
            "phase": state.position.phase,
            "step": step,
            "epoch": step / phase.steps_per_epoch,
            "loss": float(sums[0]) / count,
            "accuracy": float(sums[1]) / count,
            "lr": last.rate,
            "eps": phase.recipe.eps(step - 1),
            "density": compression.density_at(step - 1),
            "sent_bytes": compression.sent_bytes,
            "dense_bytes": compression.dense_bytes,
            "step_s": sum(result.step_s for result in results) / len(results),
            "attack_s": sum(result.attack_s for result in results) / len(results),
            "hook_s": (compression.seconds - window.hook_s) / len(results),
            "decode_s": (compression.decode_seconds - window.decode_s) / len(results),
            "residual_norm_ratio": compression.residual_norm_ratio(),
            "nonfinite_steps": compression.skipped_steps,
            "layer_lr_ratio": mean_by_layer(last.ratios),
            "layer_noise": {} if state.noise is None else norm_by_layer(state.noise.by_name()),
            "samples": state.samples,
        }
    )
    return bool(rows[:, 3].any())


def _check_digests(state: TrainState, phase: Phase, digests: Tensor) -> None:
    """Raises DivergedError, on every rank, unless all are equal."""
    differing = [rank for rank, digest in enumerate(digests.tolist()) if digest != int(digests[0])]
    if differing:
        phase.emit({"event": "diverged", "phase": state.position.phase, "replicas": len(differing)})
        raise DivergedError(
            f"{state.position.phase}, step {state.position.step}: parameters of ranks {differing} differ from rank 0; "
            "start again to continue from the last checkpoint"
        )


def _report_slow(state: TrainState, phase: Phase, own_s: list[float]) -> None:
    """A notice when a rank begins to hold the others up, and when none does any more."""
    if phase.config.cluster.slow_ratio is None:
        return
    found = slow_ranks(own_s, phase.config.cluster.slow_ratio)
    where = f"{state.position.phase}, step {state.position.step}"
    for rank in sorted(found.keys() - state.slow):
        phase.emit({"event": "notice", "text": f"{where}: {found[rank]}"})
    if state.slow and not found:
        phase.emit({"event": "notice", "text": f"{where}: all ranks are about as fast again"})
    state.slow = frozenset(found)


def _is_over(state: TrainState, phase: Phase) -> bool:
    """Held-out accuracy has not risen for `patience` epochs."""
    if phase.settings.patience is None or state.best is None:
        return False
    return state.position.step // phase.steps_per_epoch - state.best.epoch >= phase.settings.patience


def _held_out_score(
    state: TrainState, phase: Phase, net: nn.Module, attack: Attack, threat: Threat | None, limit: int
) -> Score:
    return scoring.distributed_score(
        net,
        phase.held_out,
        attack,
        threat,
        limit=limit,
        batch_size=phase.config.evaluate.batch_size,
        seed=phase.config.run.seed,
        transport=state.transport,
        beat=phase.beat,
    )


def _watch(state: TrainState, phase: Phase, attack: AttackConfig) -> None:
    """Looks for catastrophic overfitting (Wong, Rice and Kolter, ICLR 2020): right under one step of FGSM, wrong under
    PGD, both at the present eps."""
    net = scoring.averaged(state.net, state.transport)
    position, threat = state.position, phase.recipe.threat(state.position.step - 1)
    fgsm, pgd = (_held_out_score(state, phase, net, a, threat, WATCH_IMAGES) for a in (Attack("fgsm"), EPOCH_ATTACK))
    phase.emit(
        {
            "event": "watch",
            "phase": position.phase,
            "step": position.step,
            "eps": threat.eps,
            "fgsm_accuracy": fgsm.accuracy,
            "pgd_accuracy": pgd.accuracy,
            "gap": fgsm.accuracy - pgd.accuracy,
            "samples": pgd.samples,
        }
    )
    if state.collapsed or not has_collapsed(fgsm.accuracy, pgd.accuracy):
        return
    state.collapsed = True
    seen = (
        f"{position.phase}, step {position.step}: catastrophic overfitting: {fgsm.accuracy:.0%} right under "
        f"{fgsm.attack}, {pgd.accuracy:.0%} under {pgd.attack}, {pgd.samples} held-out images"
    )
    if attack.on_collapse == "stop":
        raise DivergedError(f"{seen}; the last checkpoint is kept; try attack.name=pgd, or attack.on_collapse=pgd")
    then = (
        f"training goes on against PGD-{attack.steps}" if attack.on_collapse == "pgd" else "try attack.on_collapse=pgd"
    )
    phase.emit({"event": "notice", "text": f"{seen}; {then}"})


def has_collapsed(fgsm_accuracy: float, pgd_accuracy: float) -> bool:
    """Half of what withstands FGSM falls to PGD, and it is not a matter of a few images: after a collapse nearly all of
    it does."""
    return fgsm_accuracy - pgd_accuracy > max(0.1, fgsm_accuracy / 2)


def _score_epoch(state: TrainState, phase: Phase) -> None:
    config, position = phase.config, state.position
    net = scoring.averaged(state.result, state.transport)
    clean = _held_out_score(state, phase, net, scoring.NATURAL, None, 0)
    record: dict[str, Any] = {
        "event": "epoch",
        "phase": position.phase,
        "step": position.step,
        "epoch": position.step // phase.steps_per_epoch,
        "clean_accuracy": clean.accuracy,
        "robust_accuracy": None,
        "attack": "",
        "samples": clean.samples,
    }
    if config.attack is not None:
        threat = ball(config.attack.norm, config.attack.eps, config.model.reads_text)
        robust = _held_out_score(state, phase, net, EPOCH_ATTACK, threat, config.evaluate.held_out_images)
        record.update(robust_accuracy=robust.accuracy, attack=robust.attack, samples=robust.samples)
    phase.emit(record)
    counts = "clean_accuracy" if phase.recipe.attack is None else "robust_accuracy"
    where, what = f"{position.phase}, epoch {record['epoch']}", counts.replace("_", " ")
    if state.accuracy_gradient is not None and state.accuracy_gradient.update(record[counts]):
        text = f"{what} no longer rises: learning rate times {state.accuracy_gradient.factor:g} from here on"
        phase.emit({"event": "notice", "text": f"{where}: {text}"})
    if phase.settings.patience is None:
        return
    if state.best is None or record[counts] > state.best.accuracy:
        state.best = Best(record[counts], record["epoch"])
        phase.keep_best(net)
    elif _is_over(state, phase):
        text = f"{what} was best after epoch {state.best.epoch}, {state.best.accuracy:.1%}, and has not risen since"
        phase.emit({"event": "notice", "text": f"{where}: {text}: stopped"})
