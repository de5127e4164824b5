"""Training losses, each in two parts: the examples it is computed on, and one forward pass through the DDP wrapper.

    Natural     CE(f(x), y)
    PGDAT       CE(f(x'), y)                                                        Madry et al. 2018, eq. 2.1
    TRADES      CE(f(x), y) + beta/B sum KL(softmax f(x) || softmax f(x'))          Zhang et al. 2019, eq. 5
                x' maximises the KL term from x + 0.001 N(0, 1); beta 6; 10 steps of 0.007 at eps 0.031
    MART        CE(f(x'), y) - mean log(1.0001 - max_{c != y} p'_c)
                + beta/B sum KL(p || p') (1 - p_y)                                  Wang et al. 2020
                p, p' the softmax of f(x), f(x'); beta 5; x' from PGD on the cross-entropy

`forward` is what is trained, the DistributedDataParallel wrapper or the model itself; `model` is the
inner module, on which the attack runs. x: (B, C, H, W) float in [0, 1]; y: (B,) int64; generator: on x's
device. Losses are means over the batch, in float32 also under autocast. label_smoothing applies to the cross-entropy
that is trained on, never to an attack's.

Differences from the authors' code of TRADES and MART: f(x) and f(x') come from one forward pass of cat(x, x'), because
two forward passes of a DDP wrapper before a backward fail with batch norm (pytorch 175024); so batch-norm statistics
are those of both halves together. The step of TRADES is scaled to the ball: 10 x 0.007 / 0.031 eps in all, whatever
the number of steps.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
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
_NO_ATTACK, _NO_THREAT = Attack("none"), Threat("linf", 0.0)


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


@dataclass(frozen=True)
class TrainingLoss(ABC):
    """`examples`, then `objective` on them; calling it does both."""

    label_smoothing: float = 0.0

    def examples(
        self, model: nn.Module, x: Tensor, y: Tensor, attack: Attack, threat: Threat, generator: torch.Generator | None
    ) -> Tensor:
        """x', detached: what the attack makes of x. No parameter gets a gradient and no hook fires."""
        return attack(model, x, y, threat, generator)

    @abstractmethod
    def objective(self, forward: Forward, x: Tensor, x_adv: Tensor, y: Tensor) -> LossOutput:
        """The loss on given examples, with one call of `forward`."""

    def __call__(
        self,
        forward: Forward,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        attack: Attack = _NO_ATTACK,
        threat: Threat = _NO_THREAT,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        return self.objective(forward, x, self.examples(model, x, y, attack, threat, generator), y)

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(logits), y, label_smoothing=self.label_smoothing)


class Natural(TrainingLoss):
    """CE(f(x), y). An attack is accepted for a common signature and not run."""

    def examples(
        self, model: nn.Module, x: Tensor, y: Tensor, attack: Attack, threat: Threat, generator: torch.Generator | None
    ) -> Tensor:
        return x

    def objective(self, forward: Forward, x: Tensor, x_adv: Tensor, y: Tensor) -> LossOutput:
        logits = forward(x)
        return LossOutput(self._cross_entropy(logits, y), clean_logits=logits.detach())


class PGDAT(TrainingLoss):
    """CE(f(x'), y), x' from any attack (n_fgsm is the fast recipe)."""

    def objective(self, forward: Forward, x: Tensor, x_adv: Tensor, y: Tensor) -> LossOutput:
        logits = forward(x_adv)
        return LossOutput(self._cross_entropy(logits, y), adversarial_logits=logits.detach(), x_adv=x_adv)


@dataclass(frozen=True)
class TRADES(TrainingLoss):
    """CE(f(x), y) + beta/B sum KL(f(x) || f(x')). TRADES_ATTACK is the paper's; beta >= 0, or ConfigError."""

    beta: float = 6.0

    def __post_init__(self) -> None:
        _check_beta("trades", self.beta, 6)

    def examples(
        self, model: nn.Module, x: Tensor, y: Tensor, attack: Attack, threat: Threat, generator: torch.Generator | None
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
        return attack(model, x, y, threat, generator, loss=lambda logits, _: _kl(log_p, logits).sum(), start=start)

    def objective(self, forward: Forward, x: Tensor, x_adv: Tensor, y: Tensor) -> LossOutput:
        clean, adversarial = at_least_float32(forward(torch.cat([x, x_adv]))).chunk(2)
        kl = _kl(clean.log_softmax(1), adversarial).sum() / x.shape[0]
        loss = self._cross_entropy(clean, y) + self.beta * kl
        return LossOutput(loss, clean.detach(), adversarial.detach(), x_adv)


@dataclass(frozen=True)
class MART(TrainingLoss):
    """Boosted cross-entropy on x', and the KL term weighted by the doubt about x. beta >= 0, or ConfigError."""

    beta: float = 5.0

    def __post_init__(self) -> None:
        _check_beta("mart", self.beta, 5)

    def objective(self, forward: Forward, x: Tensor, x_adv: Tensor, y: Tensor) -> LossOutput:
        clean, adversarial = at_least_float32(forward(torch.cat([x, x_adv]))).chunk(2)
        others = adversarial.softmax(1).scatter(1, y[:, None], 0.0)
        margin = -(1.0001 - others.amax(1)).log().mean()
        doubt = 1.0 - clean.softmax(1).gather(1, y[:, None])[:, 0]
        kl = (_kl(clean.log_softmax(1), adversarial).sum(1) * doubt).mean()
        loss = self._cross_entropy(adversarial, y) + margin + self.beta * kl
        return LossOutput(loss, clean.detach(), adversarial.detach(), x_adv)


def _check_beta(name: str, beta: float, paper: float) -> None:
    if not (beta >= 0 and math.isfinite(beta)):
        raise ConfigError(f"{name} beta: {beta}; must be finite and at least 0 (the paper's is {paper})")


def _kl(log_p: Tensor, logits: Tensor) -> Tensor:
    """(B, num_classes): p (log p - log softmax(logits)), in float32."""
    return F.kl_div(at_least_float32(logits).log_softmax(1), log_p, reduction="none", log_target=True)
