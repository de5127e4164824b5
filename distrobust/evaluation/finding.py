"""What a trial found over all batches, as numbers: accuracy with its interval, a curve, an expectation.

    expected robustness    R = 1/eps_max * integral over [0, eps_max] of accuracy(eps) d eps, by the trapezoid
                           rule over the curve's budgets, with clean accuracy at 0

R is the robust accuracy at a budget drawn uniformly from [0, eps_max]. As the trapezoid rule is linear, R is
the mean over images of each image's own R_i in [0, 1]; its interval is mean +- 1.96 standard errors, in [0, 1].
Straight lines between the budgets measured are an assumption: more budgets make it smaller.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from distrobust.evaluation.accuracy import Score, wilson
from distrobust.evaluation.flags import Flag
from distrobust.evaluation.trial import Trial, Verdict

Codes = NDArray[np.int8]


@dataclass(frozen=True)
class Finding:
    """The verdicts of `trial` on all batches, in their order. labels: (n,) integers of all images."""

    trial: Trial
    verdicts: tuple[Verdict, ...]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.codes) != len(self.labels):
            raise ValueError(f"{self.trial.describe()}: verdicts on {len(self.codes)} of {len(self.labels)} images")

    @cached_property
    def codes(self) -> Codes:
        """(n,) 1 stands, 0 has fallen, -1 not in the trial."""
        text = "".join(verdict.right for verdict in self.verdicts)
        return np.frombuffer(text.encode(), np.uint8).astype(np.int8) - ord("0") if text else np.empty(0, np.int8)

    @property
    def samples(self) -> int:
        return int((self.codes >= 0).sum())

    @property
    def correct(self) -> int:
        return int((self.codes == 1).sum())

    @cached_property
    def counts(self) -> Counter[str]:
        """Of the verdicts, added."""
        return sum((Counter(verdict.counts) for verdict in self.verdicts), Counter())

    def per_class(self, num_classes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(right, samples) of every class."""
        right, samples = (
            np.bincount(self.labels[mask], minlength=num_classes) for mask in (self.codes == 1, self.codes >= 0)
        )
        return tuple(right.tolist()), tuple(samples.tolist())


@dataclass(frozen=True)
class Result:
    """A number with what it takes to judge it, and what it cost. score.seconds: added over processes.

    forward_images, backward_images: through the model, and through the source of a transfer. role: as the
    trial's; 'worst' is not a trial but what stands after all of them at that budget.
    """

    role: str
    score: Score
    restarts: int
    forward_images: int
    backward_images: int


def result(finding: Finding, seed: int, num_classes: int, flags: Sequence[Flag], name: str | None = None) -> Result:
    """flags: those that concern this number. name: instead of the trial's."""
    trial, (right, samples) = finding.trial, finding.per_class(num_classes)
    low, high = wilson(finding.correct, finding.samples)
    score = Score(
        attack=name or trial.describe(),
        norm=trial.threat.norm if trial.threat else None,
        eps=trial.threat.eps if trial.threat else 0.0,
        steps=trial.steps,
        samples=finding.samples,
        correct=finding.correct,
        accuracy=finding.correct / max(1, finding.samples),
        low=low,
        high=high,
        seed=seed,
        seconds=sum(verdict.seconds for verdict in finding.verdicts),
        flags=tuple(str(flag) for flag in flags),
        class_correct=right,
        class_samples=samples,
    )
    forward, backward = (sum(getattr(v, way) for v in finding.verdicts) for way in ("forward", "backward"))
    return Result("worst" if name else trial.role, score, trial.restarts, forward, backward)


def worst_case(findings: Sequence[Finding]) -> Finding:
    """What stands under each of `findings`, all of one budget and of all images. It cost nothing more."""
    codes = np.minimum.reduce([finding.codes for finding in findings])
    verdict = Verdict("".join(map(str, codes.tolist())))
    return Finding(findings[0].trial, (verdict,), findings[0].labels)


@dataclass(frozen=True)
class ExpectedRobustness:
    """R over [0, eps_max], see the module's docstring."""

    mean: float
    low: float
    high: float
    norm: str
    eps_max: float
    samples: int


def expected_robustness(clean: Finding, curve: Sequence[Finding]) -> ExpectedRobustness | None:
    """None without a curve or images. curve: of ascending budgets, on the images of `clean`."""
    if not curve or not clean.samples:
        return None
    threats = [finding.trial.threat for finding in curve]
    norm = threats[0].norm if threats[0] else ""
    eps = np.array([0.0, *(threat.eps for threat in threats if threat)])
    right = np.stack([finding.codes for finding in (clean, *curve)]).astype(np.float64)
    each = (np.diff(eps)[:, None] * (right[:-1] + right[1:]) / 2).sum(axis=0) / eps[-1]
    mean, n = float(each.mean()), len(each)
    half = NormalDist().inv_cdf(0.975) * float(each.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    return ExpectedRobustness(mean, max(0.0, mean - half), min(1.0, mean + half), norm, float(eps[-1]), n)
