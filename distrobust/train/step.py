"""One optimizer step: augment, attack, backward through the compression hook, rates, step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distrobust.adversarial import losses
from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.config import AttackConfig, PhaseConfig
from distrobust.data import crop_and_flip
from distrobust.optim.injection import add_noise_
from distrobust.optim.schedules import Schedule, ramp
from distrobust.train.randomness import generator_at, seed_of
from distrobust.train.state import TrainState


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

    def eps(self, step: int) -> float:
        """Budget of a step in image units; 0 without an attack."""
        return 0.0 if self.attack is None else self.attack.eps * ramp(step / self.num_steps, self.attack.ramp)


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


def train_step(state: TrainState, images: Tensor, labels: Tensor, recipe: Recipe, rank: int) -> StepResult:
    """images (B, C, H, W) uint8 and labels (B,) int64 on the model's device. Advances `state` by one step.

    A step with a non-finite gradient on any rank changes nothing but the counters: no parameter, residual, rate or
    batch-norm statistic. Raises CommError or CodecError if the exchange failed.
    """
    started = time.perf_counter()
    step, ordinal = state.position.step, state.position.ordinal
    generator = generator_at(images.device, recipe.seed, ordinal, step, rank)
    torch.manual_seed(seed_of(recipe.seed, ordinal, step, rank, 1))  # for layers that draw, such as dropout
    x = crop_and_flip(images, generator, pad=recipe.crop, flip=recipe.flip).float().div_(255)
    if recipe.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    kept = [buffer.clone() for buffer in state.net.buffers()]

    state.ddp.train()
    for norm in state.frozen_norms:
        norm.eval()
    state.optimizer.zero_grad(set_to_none=True)
    state.compression.step_ahead()  # before the attack: it should meet the weights that learn from it
    forward_started = started

    def forward(inputs: Tensor) -> Tensor:
        nonlocal forward_started
        forward_started = time.perf_counter()
        return state.ddp(inputs)  # type: ignore[no-any-return]

    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.phase.precision == "bf16"):
        output = _loss(recipe, step)(forward, state.net, x, labels, generator=generator)
    try:
        output.loss.backward()
    except Exception:
        state.compression.raise_cause()
        raise

    rate = recipe.schedule.at(step / recipe.num_steps)
    if state.accuracy_gradient is not None:
        rate = state.accuracy_gradient.rate(rate)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group.get("rate_multiplier", 1.0)
    if recipe.phase.gradient_noise is not None:
        shared = generator_at(images.device, recipe.seed, ordinal, step)  # the same on every rank
        gradients = [p.grad for p in state.net.parameters() if p.grad is not None]
        add_noise_(gradients, step, recipe.phase.gradient_noise, shared)
    if state.compression.skipped:
        torch._foreach_copy_(list(state.net.buffers()), kept)
    (state.adaptive or state.optimizer).step()
    correct = (output.logits.argmax(1) == labels).sum()
    finished = time.perf_counter()
    return StepResult(
        output.loss.detach(),
        correct,
        len(labels),
        rate,
        state.ratios(),
        finished - started,
        forward_started - started,
    )


def _loss(recipe: Recipe, step: int) -> partial[losses.LossOutput]:
    smoothing = recipe.phase.label_smoothing
    if recipe.attack is None:
        return partial(losses.natural, label_smoothing=smoothing)
    settings = recipe.attack
    attack = Attack(settings.name, settings.steps, settings.step_size)
    threat = Threat(settings.norm, recipe.eps(step))
    if settings.loss == "trades":
        return partial(losses.trades, attack=attack, threat=threat, beta=settings.beta, label_smoothing=smoothing)
    return partial(losses.pgd_at, attack=attack, threat=threat, label_smoothing=smoothing)
