"""From counted images to a number with an interval and the reasons to distrust it.

    Wilson interval (1927), n samples, p = correct/n, z the normal quantile:
        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

Each rank counts (`Counts`: integers that add up over ranks with +, or with a SUM over `pack()`); `score`
makes the number, with the flags of flags.py that counts alone can raise.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Norm, Threat
from distrobust.evaluation import flags
from distrobust.evaluation.flags import MIN_SAMPLES


def wilson(correct: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of the accuracy; (0, 1) without samples. ValueError unless 0 <= correct <= samples."""
    if not 0 <= correct <= samples or not 0 < confidence < 1:
        raise ValueError(f"wilson: correct {correct} of samples {samples} at confidence {confidence}")
    if samples == 0:
        return 0.0, 1.0
    n, p, z = samples, correct / samples, NormalDist().inv_cdf((1 + confidence) / 2)
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    # The bounds are exact at the ends, and rounding must not push them past the estimate.
    return (0.0 if correct == 0 else max(0.0, low)), (1.0 if correct == samples else min(1.0, high))


@dataclass(frozen=True)
class Counts:
    """What one rank counted. Sums with +; class_correct[c] and class_samples[c] are per label c.

    zero_gradients, nonfinite_gradients: images whose input gradient was all zero, or had a non-finite
    entry, at the clean image; 0 without an attack. training_mode: how many of the added counts came from
    a model in training mode. seconds: added too, device time.
    """

    class_correct: tuple[int, ...] = ()
    class_samples: tuple[int, ...] = ()
    zero_gradients: int = 0
    nonfinite_gradients: int = 0
    training_mode: int = 0
    seconds: float = 0.0

    @property
    def correct(self) -> int:
        return sum(self.class_correct)

    @property
    def samples(self) -> int:
        return sum(self.class_samples)

    def __add__(self, other: Counts) -> Counts:
        def added(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(i + j for i, j in itertools.zip_longest(a, b, fillvalue=0))

        return Counts(
            added(self.class_correct, other.class_correct),
            added(self.class_samples, other.class_samples),
            self.zero_gradients + other.zero_gradients,
            self.nonfinite_gradients + other.nonfinite_gradients,
            self.training_mode + other.training_mode,
            self.seconds + other.seconds,
        )

    def pack(self, num_classes: int) -> Tensor:
        """(4 + 2 num_classes,) float64 on the CPU, of the same length on every rank, to be all-reduced
        with SUM."""
        correct, samples = (
            list(counts) + [0] * (num_classes - len(counts)) for counts in (self.class_correct, self.class_samples)
        )
        head = [self.zero_gradients, self.nonfinite_gradients, self.training_mode, self.seconds]
        return torch.tensor([*head, *correct, *samples], dtype=torch.float64)

    @staticmethod
    def unpack(packed: Tensor) -> Counts:
        """The inverse of pack, after the sum."""
        zero, nonfinite, training, seconds, *counts = packed.tolist()
        per_class = [round(c) for c in counts]
        half = len(per_class) // 2
        return Counts(
            tuple(per_class[:half]),
            tuple(per_class[half:]),
            round(zero),
            round(nonfinite),
            round(training),
            seconds,
        )


@dataclass(frozen=True)
class Score:
    """An accuracy with what is needed to judge it; dataclasses.asdict gives a record.

    attack: 'PGD-20 Linf 8/255', 'clean', with the library's name if it is not ours. norm: None for clean.
    accuracy, low, high: in [0, 1], the interval at 95 %. seconds: summed over ranks. flags: sentences,
    empty when there is no reason for distrust.
    """

    attack: str
    norm: Norm | None
    eps: float
    steps: int
    samples: int
    correct: int
    accuracy: float
    low: float
    high: float
    seed: int
    seconds: float
    flags: tuple[str, ...]
    class_correct: tuple[int, ...]
    class_samples: tuple[int, ...]


def score(
    counts: Counts, attack: Attack | None, threat: Threat | None, seed: int, *, library: str | None = None
) -> Score:
    """The number that `counts`, summed over all ranks, stand for. accuracy is 0 without samples."""
    attacked = attack is not None and threat is not None and attack.name != "none"
    name = attack.describe(threat) if attack is not None and threat is not None else "clean"
    low, high = wilson(counts.correct, counts.samples)
    return Score(
        attack=f"{name} ({library})" if library else name,
        norm=threat.norm if attacked and threat is not None else None,
        eps=threat.eps if attacked and threat is not None else 0.0,
        steps=attack.num_gradients if attacked and attack is not None else 0,
        samples=counts.samples,
        correct=counts.correct,
        accuracy=counts.correct / max(1, counts.samples),
        low=low,
        high=high,
        seed=seed,
        seconds=counts.seconds,
        flags=reasons_for_distrust(counts),
        class_correct=counts.class_correct,
        class_samples=counts.class_samples,
    )


def reasons_for_distrust(counts: Counts) -> tuple[str, ...]:
    """The flags that `counts` raise, as sentences."""
    n = counts.samples
    raised = []
    if n < MIN_SAMPLES:
        raised.append(flags.few_samples(n))
    if counts.zero_gradients:
        raised.append(flags.zero_gradients(counts.zero_gradients, n))
    if counts.nonfinite_gradients:
        raised.append(flags.nonfinite_gradients(counts.nonfinite_gradients, n))
    if counts.training_mode:
        raised.append(flags.training_mode())
    return tuple(str(flag) for flag in raised)
