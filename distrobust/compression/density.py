"""Density over the run: down the paper's ladder to the target, and up again for the last steps.

Deep Gradient Compression (Lin et al., ICLR 2018), section 3.3, warm-up training: sparsity rises exponentially over the
first epochs. The paper's values are 25, 6.25, 1.5625, 0.4 and 0.1 %; rungs at or below the target are left out.
Here the ladder covers a share of the run, each rung for the same number of steps, since fine-tuning runs are short.
The last steps may be denser (not in the paper): what is in the residual when a run ends is lost.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from distrobust.errors import ConfigError

_log = logging.getLogger(__name__)

LADDER = (0.25, 0.0625, 0.015625, 0.004, 0.001)


@dataclass(frozen=True)
class Schedule:
    """Density (fraction of coordinates sent, in (0, 1]) as a function of the step.

    `warmup_steps` steps are spent on the rungs above `density`; 0 means the target from the first step on. The last
    `final_steps` of `num_steps` are sent at `final_density`; neither counts if the length of the run is not known (0).
    """

    density: float
    warmup_steps: int = 0
    ladder: tuple[float, ...] = LADDER
    num_steps: int = 0
    final_steps: int = 0
    final_density: float = 1.0

    def __post_init__(self) -> None:
        for value in (self.density, *self.ladder, self.final_density):
            if not 0.0 < value <= 1.0:
                raise ConfigError(f"compress.density: got {value}, wanted a fraction above 0 and at most 1")
        for name in ("warmup_steps", "num_steps", "final_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"compress: got {getattr(self, name)} {name}, wanted 0 or more")

    def at(self, step: int) -> float:
        """Density of step 0, 1, ..."""
        if self.num_steps - self.final_steps <= step < self.num_steps:
            return max(self.density, self.final_density)
        rungs = [rung for rung in self.ladder if rung > self.density]
        if not rungs or step >= self.warmup_steps:
            return self.density
        return rungs[step * len(rungs) // self.warmup_steps]


def planned(
    density: float,
    num_steps: int | None,
    warmup: float,
    ladder: tuple[float, ...] = LADDER,
    final_steps: int = 0,
    final_density: float = 1.0,
) -> Schedule:
    """warmup: share of the run. A run of unknown length has no warm-up, which is logged, and no end. ConfigError."""
    if not 0.0 <= warmup <= 1.0:
        raise ConfigError(f"compress.warmup: got {warmup}, wanted a share of the run from 0 to 1")
    steps = num_steps or 0
    schedule = Schedule(density, round(warmup * steps), ladder, steps, final_steps, final_density)
    if num_steps is None and warmup and any(rung > density for rung in ladder):
        _log.warning("compress: no warm-up, because the length of the run is unknown; pass num_steps=")
    return schedule


def for_budget(schedule: Schedule, budget_bytes: float, step_bytes: Callable[[float], int]) -> Schedule:
    """`schedule` with the largest density at which the run's messages stay within `budget_bytes`.

    step_bytes: what a step at a density sends. Raises ConfigError if warm-up and end alone need more.
    """
    if not schedule.num_steps:
        raise ConfigError("compress.density: 'auto' needs the number of steps of the run (num_steps)")

    final = max(0, schedule.num_steps - schedule.final_steps)
    special = {*range(min(schedule.warmup_steps, schedule.num_steps)), *range(final, schedule.num_steps)}

    def total(density: float) -> int:
        tried = replace(schedule, density=density)
        counts = Counter(tried.at(step) for step in special)
        counts[density] += schedule.num_steps - len(special)
        return sum(step_bytes(value) * count for value, count in counts.items())

    low, high = 1e-6, 1.0
    if total(low) > budget_bytes:
        raise ConfigError(
            f"compress.density: auto: at the lowest density {schedule.num_steps} steps send {total(low) / 1e6:.4g} MB, "
            f"warm-up and end included, the budget is {max(0.0, budget_bytes) / 1e6:.4g} MB; allow more bytes or time, "
            "or shorten compress.warmup and compress.final_steps"
        )
    if total(high) <= budget_bytes:
        return replace(schedule, density=high)
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if total(middle) <= budget_bytes else (low, middle)
    return replace(schedule, density=low)
