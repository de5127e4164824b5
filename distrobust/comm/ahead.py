"""Step-ahead error feedback: the gradient is computed where this rank's own unsent update will lead.

Step-Ahead Error Feedback (Xu, Huo and Huang, AAAI 2021), section 4. Every rank holds the same w; its residual v_i is an
update that waits. Plain error feedback computes the gradient at w, as if nothing waited, and applies the update many
steps late. Here rank i computes it at w - rate * c * v_i, and the parameters are back at w, to the bit, before the
optimizer steps: between steps they are the same on every rank.

How far, c. The paper: all of v_i, c = 1, and the errors of all ranks averaged now and then. To first order the mean of
the ranks' gradients is then the one at w - rate * mean v_i, where w will be. But v_i is mostly noise of a rank's own
examples, the more the larger N is, and leads astray by c^2 ||v_i||^2. c = 1 / N, a rank's part of the mean, goes least
astray and leaves most of the delay. 2 / N, all of v_i with two ranks, lies between; benchmarks/accuracy.py has others
beside it (`step-ahead by`). v is the accumulated velocity of Deep Gradient Compression, in units of a gradient, so the
shift takes the present rate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter

from distrobust.comm.flat import flat
from distrobust.compression.memory import Residual


class StepAhead:
    """Moves parameters ahead and back; keeps a copy of the shared ones, n floats. `rates`: learning rate by name."""

    def __init__(
        self,
        parameters: dict[str, Parameter],
        residuals: dict[str, Residual],
        num_ranks: int,
        rates: Callable[[], dict[str, float]],
    ) -> None:
        self._parameters = parameters
        self._residuals = residuals
        self.share = min(1.0, 2.0 / num_ranks)  # c
        self._rates = rates
        self._kept: dict[str, Tensor] = {}
        self._moved: list[str] = []
        self.is_ahead = False

    @torch.no_grad()
    def go(self) -> None:
        """w -> w - rate * share * v, unless already there."""
        if self.is_ahead:
            return
        rates = self._rates()
        self._moved = []
        for name, parameter in self._parameters.items():
            residual = self._residuals[name]
            if residual.settled:  # v is zero
                continue
            here = flat(parameter.detach())
            kept = self._kept.get(name)
            if kept is None:
                kept = self._kept[name] = torch.empty_like(here)
            kept.copy_(here)
            here.add_(residual.v.to(here.dtype), alpha=-rates[name] * self.share)
            self._moved.append(name)
        self.is_ahead = True

    @torch.no_grad()
    def back(self) -> None:
        """To the shared w, the very bits."""
        if not self.is_ahead:
            return
        for name in self._moved:
            flat(self._parameters[name].detach()).copy_(self._kept[name])
        self.is_ahead = False
