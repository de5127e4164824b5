"""The learning rate and the attack's budget as pure functions of progress.

u in [0, 1] is the share of the run that is done (step / total), p the warm-up share, f0 the floor, v = (u
- p) / (1 - p). All shapes but `constant` rise linearly, then fall:

    rise, u < p                 lr(u) = peak (f0 + (1 - f0) u / p)
    one_cycle                   lr(u) = peak (1 - v)
    slow_start_fast_decay       lr(u) = peak exp(-k v),  k = ln 100
    cosine                      lr(u) = peak (1 + cos(pi v)) / 2
    constant                    lr(u) = peak, no warm-up

`slow_start_fast_decay` follows the words of Jeddi, Shafiee, Wong 2020 (arXiv 2012.13628): a slow start,
then a fast decay. That paper prints no readable formula and has no code, so this parametrisation is ours.
The default is `one_cycle`. `ramp` is the epsilon scheduling of arXiv 2509.23325 in its simplest
form.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Literal, get_args

from distrobust.errors import ConfigError

Name = Literal["one_cycle", "slow_start_fast_decay", "cosine", "constant"]
Rule = Literal["linear", "sqrt"]
FAST_DECAY = math.log(100.0)  # k: the rate ends at a hundredth of its peak


@dataclass(frozen=True)
class Schedule:
    """A learning rate over a run; valid by construction, or ConfigError.

    name: the shape. peak: the highest rate, reached exactly at u = warmup; finite, above 0. warmup: p,
    the share of the run spent rising, in [0, 1]. floor: f0, the first rate as a share of the peak, in [0,
    1].
    """

    name: Name = "one_cycle"
    peak: float = 0.1
    warmup: float = 0.2
    floor: float = 0.01

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            closest = difflib.get_close_matches(str(self.name), get_args(Name), n=1, cutoff=0.4)
            hint = f"did you mean {closest[0]!r}? " if closest else ""
            raise ConfigError(f"schedule.name: {self.name!r}; {hint}valid: {', '.join(get_args(Name))}")
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise ConfigError(f"schedule.peak: {self.peak}; must be finite and above 0")
        for field, value in (("warmup", self.warmup), ("floor", self.floor)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"schedule.{field}: {value}; must be in [0, 1], a share and not a percentage")

    def at(self, u: float) -> float:
        """The learning rate at progress u in [0, 1]; ValueError outside."""
        _check_progress(u)
        p, f0 = self.warmup, self.floor
        if self.name == "constant":
            return self.peak
        if u < p:
            # 1 - (1 - f0)(1 - u/p) is f0 + (1 - f0) u/p, written so that rounding cannot lift it above 1
            return self.peak * (1.0 - (1.0 - f0) * (1.0 - u / p))
        v = (u - p) / (1.0 - p) if p < 1.0 else 0.0
        if self.name == "one_cycle":
            return self.peak * (1.0 - v)
        if self.name == "slow_start_fast_decay":
            return self.peak * math.exp(-FAST_DECAY * v)
        return self.peak * (1.0 + math.cos(math.pi * v)) / 2.0


def batch_factor(batch_size: int, tuned_for: int, rule: Rule) -> float:
    """What a rate found at one global batch size is multiplied with at another.

    Granziol, Zohren and Roberts, 2020 (arXiv 2006.09092): the largest stable rate of SGD grows linearly with the batch,
    that of adaptive optimizers with its square root.
    """
    growth = batch_size / tuned_for
    return growth if rule == "linear" else math.sqrt(growth)


def ramp(u: float, share: float) -> float:
    """The factor in [0, 1] on the attack's eps at progress u: linear over the first `share` of the run,
    then 1.

    share = 0 means 1 at once. ConfigError for a share outside [0, 1], ValueError for u outside.
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"eps ramp share: {share}; must be in [0, 1], a share of the run and not a percentage")
    _check_progress(u)
    return 1.0 if u >= share else u / share


def _check_progress(u: float) -> None:
    if not 0.0 <= u <= 1.0:
        raise ValueError(f"progress is {u}, must be in [0, 1]: steps done / steps of the whole run")
