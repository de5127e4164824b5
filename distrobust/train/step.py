"""One optimizer step: augment, attack, backward through the compression hook, rates, step, average."""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from distrobust.adversarial import free, losses
from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.awp import perturbed_weights
from distrobust.adversarial.points import Points
from distrobust.adversarial.threat import Norm, OpenThreat, Threat
from distrobust.config import AttackConfig, PhaseConfig
from distrobust.data import crop_and_flip
from distrobust.optim.injection import add_noise_
from distrobust.optim.schedules import Schedule, ramp
from distrobust.train.randomness import generator_at, seed_of
from distrobust.train.state import TrainState


def replays(attack: AttackConfig | None) -> int:
    """Steps in a row on the same batch."""
    return attack.replays if attack is not None and attack.name == "free" else 1


@dataclass(frozen=True)
class Recipe:
    """What a phase does at every step."""

    phase: PhaseConfig
    attack: AttackConfig | None
    schedule: Schedule
    num_steps: int
    crop: int
    flip: bool
    seed: int
    channels_last: bool
    of_text: bool = False

    @property
    def loss(self) -> losses.TrainingLoss:
        smoothing = self.phase.label_smoothing
        if self.attack is None:
            return losses.Natural(smoothing)
        beta = {} if self.attack.beta is None else {"beta": self.attack.beta}
        if self.attack.loss == "trades":
            return losses.TRADES(smoothing, **beta)
        return losses.MART(smoothing, **beta) if self.attack.loss == "mart" else losses.PGDAT(smoothing)

    def eps(self, step: int) -> float:
        """Budget of a step in image units, or the embedding's; 0 without an attack."""
        return 0.0 if self.attack is None else self.attack.eps * ramp(step / self.num_steps, self.attack.ramp)

    def threat(self, step: int) -> Threat:
        return ball("linf" if self.attack is None else self.attack.norm, self.eps(step), self.of_text)

    def attack_at(self, step: int, collapsed: bool) -> Attack:
        """Of the step's examples; none where they come from the step itself. collapsed: overfitting has been seen."""
        settings = self.attack
        if settings is None:
            return Attack("none")
        if collapsed and settings.on_collapse == "pgd":
            return Attack("pgd", settings.steps)
        if settings.name == "free":
            return Attack("none")
        first = settings.steps if settings.first_steps is None else settings.first_steps
        steps = round(first + (settings.steps - first) * step / self.num_steps)
        return Attack(settings.name, steps, settings.step_size)


def ball(norm: Norm, eps: float, of_text: bool) -> Threat:
    """Around an image, or around the embedding of a text."""
    return OpenThreat(norm, eps) if of_text else Threat(norm, eps)


@dataclass(frozen=True)
class StepResult:
    """`loss` (mean) and `correct` over this rank's `samples` images, as trained on; seconds of host time."""

    loss: Tensor
    correct: Tensor
    samples: int
    rate: float
    ratios: dict[str, float]
    step_s: float
    attack_s: float
    own_s: float
    """Of step_s, until this rank had handed over its last message: without waiting for the others."""


def train_step(state: TrainState, images: Tensor, labels: Tensor, recipe: Recipe, rank: int) -> StepResult:
    """One step of `state`. images (B, C, H, W), or tokens (B, L) of texts, uint8; labels (B,) int64; on its device.

    A step with a non-finite gradient on any rank changes nothing but the counters: no parameter, residual, rate or
    batch-norm statistic. Raises CommError or CodecError if the exchange failed.
    """
    started = time.perf_counter()
    step, ordinal = state.position.step, state.position.ordinal
    generator = generator_at(images.device, recipe.seed, ordinal, step // replays(recipe.attack), rank)
    torch.manual_seed(seed_of(recipe.seed, ordinal, step, rank, 1))  # for layers that draw, such as dropout
    x = images
    if not recipe.of_text:
        x = crop_and_flip(images, generator, pad=recipe.crop, flip=recipe.flip).float().div_(255)
    if recipe.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    kept = [buffer.clone() for buffer in state.net.buffers()]

    state.ddp.train()
    for norm in state.frozen_norms:
        norm.eval()
    state.optimizer.zero_grad(set_to_none=True)
    rate = recipe.schedule.at(step / recipe.num_steps)
    if state.accuracy_gradient is not None:
        rate = state.accuracy_gradient.rate(rate)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group.get("rate_multiplier", 1.0)
    state.compression.step_ahead()  # before the attack: it should meet the weights that learn from it
    try:
        with state.compression.staying_ahead():
            taken = _backward(state, recipe, x, labels, generator)
    except Exception:
        state.compression.raise_cause()
        raise

    if recipe.phase.gradient_noise is not None:
        shared = generator_at(images.device, recipe.seed, ordinal, step)  # the same on every rank
        gradients = [p.grad for p in state.net.parameters() if p.grad is not None]
        add_noise_(gradients, step, recipe.phase.gradient_noise, shared)
    skipped = state.compression.skipped
    if skipped and kept:
        torch._foreach_copy_(list(state.net.buffers()), kept)
    (state.adaptive or state.optimizer).step()
    if state.average is not None and not skipped:
        state.average.update_parameters(state.net)
    finished = time.perf_counter()
    return StepResult(
        torch.stack([one.loss for one in taken]).sum(),
        torch.stack([one.correct for one in taken]).sum(),
        len(labels),
        rate,
        state.ratios(),
        finished - started,
        sum(one.attack_s for one in taken),
        state.compression.handed_over_at - started,
    )


@dataclass(frozen=True)
class _Taken:
    """A micro-batch after its backward pass: its part of the mean loss, images it was right on, seconds before."""

    loss: Tensor
    correct: Tensor
    attack_s: float


def _backward(state: TrainState, recipe: Recipe, x: Tensor, y: Tensor, generator: torch.Generator) -> list[_Taken]:
    """Attack, forward and backward in `accumulate` micro-batches; the last one's backward exchanges for all."""
    num = recipe.phase.accumulate
    xs, ys = x.chunk(num), y.chunk(num)
    deltas: list[Tensor | None] = [None] * len(xs) if state.delta is None else list(state.delta.chunk(num))
    taken = []
    for i, part in enumerate(xs):
        with contextlib.nullcontext() if i == len(xs) - 1 else state.ddp.no_sync():
            one, deltas[i] = _micro_batch(state, recipe, part, ys[i], deltas[i], len(part) / len(x), generator)
        taken.append(one)
    moved = [delta for delta in deltas if delta is not None]
    state.delta = torch.cat(moved) if moved else None
    return taken


def _micro_batch(
    state: TrainState,
    recipe: Recipe,
    inputs: Tensor,
    y: Tensor,
    delta: Tensor | None,
    weight: float,
    generator: torch.Generator,
) -> tuple[_Taken, Tensor | None]:
    """weight: of its mean in the whole. delta, also returned: the perturbation of free training."""
    started, step, loss = time.perf_counter(), state.position.step, recipe.loss
    points = Points.of(state.net, inputs)
    x, threat, attack = points.x, points.ball(recipe.threat(step)), recipe.attack_at(step, state.collapsed)
    autocast = functools.partial(torch.autocast, x.device.type, torch.bfloat16, recipe.phase.precision == "bf16")
    is_free = recipe.attack is not None and recipe.attack.name == "free" and attack.name == "none"
    attacked = points.seen_by(state.attacked(inputs) if attack.num_gradients else state.net)
    with autocast():
        x_adv = free.start(x, delta, threat) if is_free else loss.examples(attacked, x, y, attack, threat, generator)

    def objective(forward: losses.Forward) -> losses.LossOutput:
        with autocast():
            return loss.objective(forward, x, x_adv, y)

    awp = None if recipe.attack is None else recipe.attack.awp
    net, ddp = points.seen_by(state.net), points.seen_by(state.ddp)
    worst = perturbed_weights(state.net, lambda: objective(net).loss, awp) if awp else contextlib.nullcontext()
    with worst:
        attack_s = time.perf_counter() - started
        output = objective(ddp)
        (output.loss * weight).backward()
    correct = (output.logits.argmax(1) == y).sum()
    taken = _Taken(output.loss.detach() * weight, correct, attack_s)
    return taken, free.moved(x, x_adv, threat) if is_free else None
