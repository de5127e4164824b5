"""One attack with its budget on one batch of images: who still stands?

An evaluation is a list of trials over the same batches (suite.py). What a trial finds for a batch, its
verdict, depends on the trial, the model, the batch and the seed alone: not on the process that runs it, nor
on other batches. So batches can be shared out, and verdicts kept and added up later.

Images that a trial named in `after` has brought down are not attacked again and count as fallen: an image
is robust only if nothing breaks it, and what breaks it in a small ball breaks it in a larger one. This holds
for images the model gets wrong (every trial comes after `clean`), for AutoAttack's four parts in a row, and
for a curve over growing budgets. Attacks that are compared with each other do not come after each other.

An adversarial image counts only if it lies in the ball and in [0, 1], up to rounding; others are counted as
`outside` and their images stand.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distrobust.adversarial.attacks import cross_entropy_sum, pgd
from distrobust.adversarial.threat import Threat, random_start
from distrobust.errors import ModelError
from distrobust.evaluation.counting import prepared, settled
from distrobust.evaluation.libraries import AutoAttackPart, autoattack_examples, foolbox_examples
from distrobust.evaluation.passes import counted

Kind = Literal["clean", "probe", "pgd", "foolbox", "apgd-ce", "apgd-t", "fab-t", "square", "transfer"]
Role = Literal["attack", "curve", "check"]
_PARTS = {"apgd-ce": "APGD-CE", "apgd-t": "+ APGD-T", "fab-t": "+ FAB-T"}  # of AutoAttack, one after another
ROUNDING = 1e-5  # of an image entry, and of eps relative to 1: an example this far outside still counts


@dataclass(frozen=True)
class Trial:
    """kind: clean predicts, probe looks at the model for the flags, the others attack; transfer is PGD made on
    another model. steps: gradients, or queries of square. restarts: 0 attacks no more and only joins what the
    trials of `after` found. every: only images whose number in the data set is a multiple. after: keys of
    earlier trials, see above. role: what the result is for; does not change it."""

    kind: Kind
    threat: Threat | None = None
    steps: int = 0
    restarts: int = 1
    every: int = 1
    after: tuple[str, ...] = ()
    role: Role = "attack"

    @property
    def key(self) -> str:
        """Names everything that determines the verdict, those of the trials before included: 'pgd-8c1f0a63b2d4'."""
        values = {name: value for name, value in asdict(self).items() if name != "role"}
        return f"{self.kind}-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]}"

    def describe(self) -> str:
        """'clean', 'PGD-20 x 5 Linf 8/255', 'AutoAttack, + APGD-T L2 0.5', after all four 'AutoAttack L2 0.5'."""
        if self.threat is None:
            return self.kind
        times = f" x {self.restarts}" if self.restarts > 1 else ""
        names = {
            "pgd": f"PGD-{self.steps}{times}",
            "foolbox": f"PGD-{self.steps}",
            "square": "AutoAttack" if len(self.after) > 1 else f"Square-{self.steps}",
            "transfer": f"transfer PGD-{self.steps}{times}",
        }
        name = names.get(self.kind) or f"AutoAttack, {_PARTS[self.kind]}"
        return f"{name} {self.threat.describe()}" + (" (foolbox)" if self.kind == "foolbox" else "")


@dataclass(frozen=True)
class Verdict:
    """Of one trial on one batch. right: a character an image, '1' stands, '0' has fallen, '-' not in the trial.

    counts: of the probe, images by what is wrong with the model's answer; of attacks, examples `outside`.
    forward, backward: images through the model, and through the source of a transfer.
    """

    right: str
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    forward: int = 0
    backward: int = 0


def attempt(
    trial: Trial,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    index: int,
    first: int,
    standing: Tensor | None = None,
    source: nn.Module | None = None,
) -> Verdict:
    """The verdict of `trial` on batch number `index`, whose first image has number `first` in the data set.

    model: inner module. x, y: (B, C, H, W) uint8, or float in [0, 1]; (B,) integers. standing: (B,) bool, those
    that no trial of `trial.after` has brought down; None: all. source: the other model of a transfer.
    Raises DataError for images outside [0, 1], ModelError if an attack needs gradients the model has not.
    """
    started = time.perf_counter()
    ((x, y, generator),) = prepared(model, [(x, y)], seed, [index])
    chosen = torch.arange(first, first + len(y), device=x.device) % trial.every == 0
    attacked = chosen if standing is None else chosen & standing.to(x.device)
    counts: Counter[str] = Counter()
    maker = source if source is not None and trial.kind == "transfer" else model
    with counted(*{model, maker}) as passes, settled(model, generator), settled(maker, generator):
        if trial.kind == "clean":
            stands = attacked & (_predict(model, x) == y)
        elif trial.kind == "probe":
            stands = attacked
            if stands.any():
                counts.update(_probe(model, x[stands], y[stands]))
        else:
            stands = _attacked(trial, model, maker, x, y, attacked, generator, counts)
    right = "".join("-" if not c else str(int(s)) for c, s in zip(chosen.tolist(), stands.tolist(), strict=True))
    return Verdict(right, dict(counts), time.perf_counter() - started, passes.forward, passes.backward)


def _attacked(
    trial: Trial,
    model: nn.Module,
    maker: nn.Module,
    x: Tensor,
    y: Tensor,
    stands: Tensor,
    generator: torch.Generator,
    counts: Counter[str],
) -> Tensor:
    """(B,) bool: those of `stands` that still stand after every restart. Examples are made on `maker`."""
    threat = trial.threat
    assert threat is not None
    if trial.kind != "square" and trial.restarts and stands.any() and not differentiable(maker, x[:1]):
        whose = "the model" if maker is model else "the source model"
        raise ModelError(
            f"{trial.describe()}: the output of {whose} has no gradient with respect to its input (a detach, a "
            "no_grad or numpy inside?); use an attack without gradients: --attacks square"
        )
    for _ in range(trial.restarts):
        start = random_start(x, threat, generator)  # of all: no image's start depends on which others stand
        if not stands.any():
            break
        x_adv = _examples(trial, maker, x[stands], y[stands], start[stands], generator.initial_seed())
        inside = in_ball(x_adv, x[stands], threat)
        counts["outside"] += int((~inside).sum())
        fallen = inside & (_predict(model, x_adv) != y[stands])
        stands = stands.clone().masked_scatter_(stands, ~fallen)
    return stands


def _examples(trial: Trial, maker: nn.Module, x: Tensor, y: Tensor, start: Tensor, seed: int) -> Tensor:
    threat = trial.threat
    assert threat is not None
    if trial.kind == "foolbox":
        return foolbox_examples(maker, x, y, threat, trial.steps)
    if trial.kind in get_args(AutoAttackPart):
        part: AutoAttackPart = trial.kind  # type: ignore[assignment]
        return autoattack_examples(maker, x, y, threat, part, seed, trial.steps)
    return pgd(maker, x, y, threat, steps=trial.steps, start=start)


def _probe(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, int]:
    """Images whose answer gives reason for distrust, by flag."""
    first, second = _logits(model, x), _logits(model, x)
    scale = first.norm(dim=1).clamp_min(1e-10)
    differs = ((first - second).norm(dim=1) / scale > 1e-4) | (first.argmax(1) != second.argmax(1))
    sums_to_one = (first.sum(1) - 1).abs() < 1e-4
    found = {
        "randomised": int(differs.sum()),
        "probabilities": int((sums_to_one & (first >= 0).all(1) & (first <= 1).all(1)).sum()),
    }
    gradient = _gradient(model, x, y)
    if gradient is None:
        return found | {"no_gradients": len(y)}
    per_image = gradient.flatten(1)
    zero, finite = (per_image == 0).all(1), per_image.isfinite().all(1)
    return found | {"zero_gradients": int(zero.sum()), "nonfinite_gradients": int((~finite).sum())}


def differentiable(model: nn.Module, x: Tensor) -> bool:
    """Whether torch can take the gradient of the model's output with respect to x (B, C, H, W)."""
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return _gradient(model, x, y) is not None


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = cross_entropy_sum(model(x), y)
        if not loss.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(loss, x, allow_unused=True)
    return gradient


def in_ball(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """(B,) bool: within eps of x and in [0, 1], up to rounding; False where there is a NaN. x: (B, C, H, W)."""
    order = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}[threat.norm]
    distance = torch.linalg.vector_norm((x_adv - x).flatten(1), ord=order, dim=1)
    flat = x_adv.flatten(1)
    in_range = (flat >= -ROUNDING).all(1) & (flat <= 1 + ROUNDING).all(1)
    near: Tensor = distance <= threat.eps + ROUNDING * max(1.0, threat.eps)
    return in_range & near


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.as_tensor(model(x)).float()


def _predict(model: nn.Module, x: Tensor) -> Tensor:
    return _logits(model, x).argmax(1)
