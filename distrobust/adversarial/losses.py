"""Training losses: natural, PGD-AT and TRADES, each one forward pass through the DDP wrapper.

    natural     CE(f(x), y)
    PGD-AT      CE(f(x'), y)                                                        Madry et al. 2018, eq. 2.1
    TRADES      CE(f(x), y) + beta/B sum KL(softmax f(x) || softmax f(x'))          Zhang et al. 2019, eq. 5
                x' maximises the KL term from x + 0.001 N(0, 1); beta 6; 10 steps of 0.007 at eps 0.031

`forward` is what is trained, the DistributedDataParallel wrapper or the model itself; `model` is the
inner module, on which the attack runs. x: (B, C, H, W) float in [0, 1]; y: (B,) int64; generator: on x's
device. Losses are means over the batch, in float32 also under autocast.

Differences from the TRADES authors' code: f(x) and f(x') come from one forward pass of cat(x, x'),
because two forward passes of a DDP wrapper before a backward fail with batch norm (pytorch 175024); so
batch-norm statistics are those of both halves together. The step is scaled to the ball: 10 x 0.007 /
0.031 eps in all, whatever the number of steps. label_smoothing applies to the cross-entropy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrobust.adversarial.attacks import Attack, evaluation_mode
from distrobust.adversarial.threat import Threat, at_least_float32
from distrobust.errors import ConfigError

Forward = Callable[[Tensor], Tensor]
TRADES_ATTACK = Attack("pgd", steps=10)
TRADES_TRAVEL = 10 * 0.007 / 0.031  # all steps together, in units of eps
TRADES_NOISE = 0.001  # standard deviation of the start, in image units


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar float32 with its graph. The rest is detached: logits (B, num_classes) of the clean
    images and of the adversarial ones, None where the loss has not computed them; x_adv: the adversarial
    images."""

    loss: Tensor
    clean_logits: Tensor | None = None
    adversarial_logits: Tensor | None = None
    x_adv: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Of the examples that were trained on: the adversarial ones where there are some, else the clean."""
        logits = self.clean_logits if self.adversarial_logits is None else self.adversarial_logits
        assert logits is not None
        return logits


def natural(
    forward: Forward,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | None = None,
    threat: Threat | None = None,
    generator: torch.Generator | None = None,
    *,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """CE(f(x), y). attack, threat and generator are accepted for a common signature and not used."""
    logits = forward(x)
    loss = F.cross_entropy(at_least_float32(logits), y, label_smoothing=label_smoothing)
    return LossOutput(loss, clean_logits=logits.detach())


def pgd_at(
    forward: Forward,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat: Threat,
    generator: torch.Generator | None = None,
    *,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """CE(f(x'), y), x' from any attack (n_fgsm is the fast recipe). The attack's own loss is not smoothed."""
    x_adv = attack(model, x, y, threat, generator)
    logits = forward(x_adv)
    loss = F.cross_entropy(at_least_float32(logits), y, label_smoothing=label_smoothing)
    return LossOutput(loss, adversarial_logits=logits.detach(), x_adv=x_adv)


def trades(
    forward: Forward,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat: Threat,
    generator: torch.Generator | None = None,
    *,
    beta: float = 6.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """CE(f(x), y) + beta/B sum KL(f(x) || f(x')). TRADES_ATTACK is the paper's; beta >= 0, or ConfigError."""
    if not beta >= 0:
        raise ConfigError(f"trades beta: {beta}; must be at least 0 (the paper's is 6)")
    x_adv = trades_examples(model, x, y, attack, threat, generator)
    clean, adversarial = at_least_float32(forward(torch.cat([x, x_adv]))).chunk(2)
    kl = _kl_sum(clean.log_softmax(1), adversarial) / x.shape[0]
    loss = F.cross_entropy(clean, y, label_smoothing=label_smoothing) + beta * kl
    return LossOutput(loss, clean.detach(), adversarial.detach(), x_adv)


def trades_examples(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, threat: Threat, generator: torch.Generator | None
) -> Tensor:
    """x' that `attack` finds on the KL term, started at x + 0.001 N(0, 1), where its gradient is not zero."""
    if attack.name == "none" or threat.eps == 0:
        return x.detach()
    if attack.name == "pgd" and attack.step_size is None:
        attack = dataclasses.replace(attack, step_size=TRADES_TRAVEL * threat.eps / attack.steps)
    # With gradients on: a weight cast to bf16 without a graph could stay in the caller's autocast cache.
    with evaluation_mode(model), torch.enable_grad():
        log_p = at_least_float32(model(x).detach()).log_softmax(1)
    noise = torch.empty(x.shape, dtype=torch.float32, device=x.device).normal_(generator=generator)
    start = torch.empty_like(x).copy_(noise).mul_(TRADES_NOISE).add_(x)
    return attack(model, x, y, threat, generator, loss=lambda logits, _: _kl_sum(log_p, logits), start=start)


def _kl_sum(log_p: Tensor, logits: Tensor) -> Tensor:
    """sum over batch and classes of p (log p - log softmax(logits)), in float32."""
    return F.kl_div(at_least_float32(logits).log_softmax(1), log_p, reduction="sum", log_target=True)
