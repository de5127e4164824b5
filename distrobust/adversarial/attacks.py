"""FGSM, N-FGSM and PGD as pure functions (model, x, y, threat) -> x'.

    FGSM (Goodfellow et al. 2015)    x' = clip(x + eps s(grad L(x)))
    RS-FGSM (Wong et al. 2020)       pgd(steps=1): a random start, alpha = 1.25 eps, projected
    N-FGSM (de Jorge et al. 2022)    x' = clip(x + eta + eps s(grad L(x + eta))), eta ~ U(-k eps, k eps)
    PGD (Madry et al. 2018)          x_0 random in the ball; x_{t+1} = project(x_t + alpha s(grad L(x_t)))

s is the sign for Linf and g / ||g|| for L2 (threat.py). N-FGSM has k = 2 and no projection. Differences:
the L2 forms of FGSM and N-FGSM are ours; x + eta is clipped to [0, 1] before the gradient is taken; alpha
of PGD defaults to 2.5 eps / steps, at most 1.25 eps.

Give these functions the **inner module, never a DistributedDataParallel wrapper** (`ddp.module`). The
gradient is taken by torch.autograd.grad with respect to the input alone: no parameter gets a .grad, and
no gradient or communication hook fires. The model is in evaluation mode meanwhile, so batch-norm
statistics stay; every submodule's own training flag comes back afterwards, also after an exception.
(Forward hooks do run: they are part of the model.)

Losses are sums over the batch, in float32: an image's gradient does not depend on the others. Under
torch.autocast, which the caller may choose, the forward pass is in the lower precision and x' keeps the
dtype of x. A step is one forward and one backward pass; nothing waits for the device.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrobust.adversarial.threat import Threat, ascend, at_least_float32, noise, project
from distrobust.adversarial.threat import random_start as threat_start
from distrobust.errors import ConfigError, ModelError

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits (B, C), y (B,)) -> scalar, summed over the batch
Name = Literal["none", "fgsm", "n_fgsm", "pgd"]
N_FGSM_K = 2.0  # noise of N-FGSM in units of eps


def cross_entropy_sum(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in float32, summed: the default loss of every attack."""
    return F.cross_entropy(at_least_float32(logits), y, reduction="sum")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """model.eval() inside; afterwards every submodule has its own training flag again, whatever happened."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """(gradient of loss(model(x), y) with respect to x, detached logits), in the model's current mode.

    Raises ModelError if torch can take no gradient with respect to x.
    """
    x = x.detach().requires_grad_()
    gradient: Tensor | None = None
    with torch.enable_grad():
        logits = model(x)
        value = loss(logits, y)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, x, allow_unused=True)
    if gradient is None:
        raise ModelError(
            f"{type(model).__name__}: its output has no gradient with respect to its input, so no attack by gradients "
            "can be made; look for detach(), no_grad() or rounding in its forward"
        )
    return gradient, logits.detach()


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator | None = None,
    step_size: float | None = None,
    loss: Loss = cross_entropy_sum,
    start: Tensor | None = None,
) -> Tensor:
    """One step of `step_size` (default eps) from x, or from `start`, projected. The generator is not used.

    x: (B, C, H, W) float in [0, 1]; y: (B,) int64. Returns x', detached, of x's dtype, device and memory
    format.
    """
    alpha = threat.eps if step_size is None else step_size
    return pgd(model, x, y, threat, steps=1, step_size=alpha, random_start=False, loss=loss, start=start)


@torch.no_grad()
def n_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator | None = None,
    k: float = N_FGSM_K,
    step_size: float | None = None,
    loss: Loss = cross_entropy_sum,
) -> Tensor:
    """Noise of k eps, one step of `step_size` (default eps), no projection.

    x' is within k eps + step_size of x, and in [0, 1]. A training attack: as it leaves the ball, it
    measures no robustness. x, y, generator: as in fgsm.
    """
    if threat.eps == 0:
        return x.detach()
    eta = noise(x, threat.norm, k * threat.eps, generator, threat.where)
    x_start = threat.clip(x + eta)
    alpha = threat.eps if step_size is None else step_size
    with evaluation_mode(model):
        gradient, _ = input_gradient(model, x_start, y, loss)
    return threat.clip(ascend(x_start, gradient, alpha, threat)).detach()


@torch.no_grad()
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    generator: torch.Generator | None = None,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    loss: Loss = cross_entropy_sum,
    start: Tensor | None = None,
) -> Tensor:
    """`steps` projected steps, from a random point of the ball, from x, or from `start`, which wins.

    x: (B, C, H, W) float in [0, 1]; y: (B,) int64; step_size: alpha in image units, default
    default_step_size; generator: on x's device. Returns x', detached, of x's dtype, device and memory
    format. eps = 0 returns x itself.
    """
    if threat.eps == 0:
        return x.detach()
    alpha = default_step_size(threat.eps, steps) if step_size is None else step_size
    x_adv = x if start is None else start
    if start is None and random_start:
        x_adv = threat_start(x, threat, generator)
    with evaluation_mode(model):
        for _ in range(steps):
            gradient, _ = input_gradient(model, x_adv, y, loss)
            x_adv = project(ascend(x_adv, gradient, alpha, threat), x, threat)
    return x_adv.detach()


def default_step_size(eps: float, steps: int) -> float:
    """2.5 eps / steps (Madry et al.: any point of the ball reaches any other), at most 1.25 eps."""
    return 2.5 * eps / max(2, steps)


@dataclass(frozen=True)
class Attack:
    """An attack with its settings, without the ball; valid by construction, or ConfigError.

    name: "none" returns x. steps: of pgd; the others take none or one. step_size: alpha in image units;
    None is each attack's own default. random_start: of pgd; fgsm starts at x, n_fgsm at noise.
    """

    name: Name = "pgd"
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            closest = difflib.get_close_matches(str(self.name), get_args(Name), n=1, cutoff=0.4)
            hint = f"did you mean {closest[0]!r}? " if closest else ""
            raise ConfigError(f"attack.name: {self.name!r}; {hint}valid: {', '.join(get_args(Name))}")
        if self.steps < 1:
            raise ConfigError(f"attack.steps: {self.steps}; must be at least 1 (name 'none' is no attack)")
        if self.step_size is not None and not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ConfigError(f"attack.step_size: {self.step_size}; must be finite and above 0, or left out")

    @property
    def num_gradients(self) -> int:
        """Forward and backward passes per batch."""
        return {"none": 0, "pgd": self.steps}.get(self.name, 1)

    def reach(self, threat: Threat) -> float:
        """The largest distance of x' from x, in the threat's norm: eps, and more for n_fgsm."""
        if self.name == "none":
            return 0.0
        if self.name == "n_fgsm":
            return N_FGSM_K * threat.eps + (threat.eps if self.step_size is None else self.step_size)
        return threat.eps

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        generator: torch.Generator | None = None,
        *,
        loss: Loss = cross_entropy_sum,
        start: Tensor | None = None,
    ) -> Tensor:
        """x' as the function of that name returns it. model: the inner module. start: as in pgd, not for
        n_fgsm."""
        if self.name == "none":
            return x.detach()
        if self.name == "n_fgsm":
            return n_fgsm(model, x, y, threat, generator=generator, step_size=self.step_size, loss=loss)
        if self.name == "fgsm":
            return fgsm(model, x, y, threat, step_size=self.step_size, loss=loss, start=start)
        return pgd(
            model,
            x,
            y,
            threat,
            generator=generator,
            steps=self.steps,
            step_size=self.step_size,
            random_start=self.random_start,
            loss=loss,
            start=start,
        )

    def describe(self, threat: Threat) -> str:
        """'PGD-20 Linf 8/255', 'FGSM L2 0.5', 'clean'."""
        if self.name == "none":
            return "clean"
        label = {"fgsm": "FGSM", "n_fgsm": "N-FGSM", "pgd": f"PGD-{self.steps}"}[self.name]
        return f"{label} {threat.describe()}"
