"""Step-ahead error feedback: the gradient is computed where this rank's own unsent update would have led.

Step-Ahead Error Feedback (Xu, Huo and Huang, AAAI 2021), section 4. Every rank holds the same w; its residual v_i is an
update that waits. Plain error feedback computes the gradient at w, as if nothing waited, and applies the update many
steps late. Here rank i computes it at w - rate * v_i and the parameters are back at w, to the bit, before the optimizer
steps: between steps they are the same on every rank, as without it.

Differences from the paper: v is the accumulated velocity of Deep Gradient Compression, in units of a gradient, so the
shift takes the present rate; errors are not averaged over ranks now and then.
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
        self, parameters: dict[str, Parameter], residuals: dict[str, Residual], rates: Callable[[], dict[str, float]]
    ) -> None:
        self._parameters = parameters
        self._residuals = residuals
        self._rates = rates
        self._shared: dict[str, Tensor] = {}
        self.is_ahead = False

    @torch.no_grad()
    def go(self) -> None:
        """w -> w - rate * v, unless already there."""
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
            here.add_(residual.v.to(here.dtype), alpha=-rates[name])
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
