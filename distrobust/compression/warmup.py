"""Density over the run: down the paper's ladder to the target.

Deep Gradient Compression (Lin et al., ICLR 2018), section 3.3, warm-up training: sparsity rises exponentially over the
first epochs. The paper's values are 25, 6.25, 1.5625, 0.4 and 0.1 %; rungs at or below the target are left out.
Here the ladder covers a share of the run, each rung for the same number of steps, since fine-tuning runs are short.
"""

from __future__ import annotations

from dataclasses import dataclass

from distrobust.errors import ConfigError

LADDER = (0.25, 0.0625, 0.015625, 0.004, 0.001)


@dataclass(frozen=True)
class Warmup:
    """Density (fraction of coordinates sent, in (0, 1]) as a function of the step.

    `num_steps` steps are spent on the rungs above `density`; 0 means the target from the first step on.
    """

    density: float
    num_steps: int = 0
    ladder: tuple[float, ...] = LADDER

    def __post_init__(self) -> None:
        for value in (self.density, *self.ladder):
            if not 0.0 < value <= 1.0:
                raise ConfigError(f"compress.density: got {value}, wanted a fraction above 0 and at most 1")
        if self.num_steps < 0:
            raise ConfigError(f"compress.warmup: got {self.num_steps} steps, wanted 0 or more")

    def at(self, step: int) -> float:
        """Density of step 0, 1, ..."""
        rungs = [rung for rung in self.ladder if rung > self.density]
        if not rungs or step >= self.num_steps:
            return self.density
        return rungs[step * len(rungs) // self.num_steps]
