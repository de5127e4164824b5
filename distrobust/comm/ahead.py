"""Step-ahead error feedback: the gradient is computed where this rank's own unsent update will lead.

Step-Ahead Error Feedback (Xu, Huo and Huang, AAAI 2021), section 4. Every rank holds the same w; its residual v_i is an
update that waits. Plain error feedback computes the gradient at w, as if nothing waited, and applies the update many
steps late. Here rank i computes it at w - rate * v_i / N, since a mean over N ranks is what will be applied, and the
parameters are back at w, to the bit, before the optimizer steps: between steps they are the same on every rank.

Differences from the paper: it shifts by all of v_i and averages the errors of all ranks now and then. Without that, all
of v_i leads astray, the more the larger N is: with few examples a rank it is mostly their noise. (The best linear guess
at the mean of all residuals from one's own is c v_i with c = ||mean v||^2 / mean ||v_i||^2, at least 1 / N;
benchmarks/accuracy.py measures it as `own_share`.) v is the accumulated velocity of Deep
Gradient Compression, in units of a gradient, so the shift takes the present rate.
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
        self._num_ranks = num_ranks
        self._rates = rates
        self._shared: dict[str, Tensor] = {}
        self.is_ahead = False

    @torch.no_grad()
    def go(self) -> None:
        """w -> w - rate * v / N, unless already there."""
        if self.is_ahead:
            return
        rates = self._rates()
        for name, parameter in self._parameters.items():
            residual = self._residuals[name]
            if residual.settled:  # v is zero
                continue
            here = flat(parameter.detach())
            shared = self._shared.get(name)
            if shared is None:
                shared = self._shared[name] = torch.empty_like(here)
            shared.copy_(here)
            here.add_(residual.v.to(here.dtype), alpha=-rates[name] / self._num_ranks)
        self.is_ahead = True

    @torch.no_grad()
    def back(self) -> None:
        """To the shared w, the very bits. Call it before residuals commit."""
        if not self.is_ahead:
            return
        for name, parameter in self._parameters.items():
            if not self._residuals[name].settled:
                flat(parameter.detach()).copy_(self._shared[name])
        self.is_ahead = False
