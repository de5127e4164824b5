"""Gradient noise of each parameter, from the difference of successive gradients.

LANTON (Hao et al., 2025, arXiv 2510.14009), option 1, with the Frobenius norm (its own dual):

    H_t = b2 H_{t-1} + (1 - b2) ||G_t - G_{t-1}||^2

G is the gradient averaged over N workers. Where only local gradients are known, since compression hides their mean,
each worker measures its own, the values are averaged, and divided by N: noise of independent gradients averages out.
One number a parameter travels inside the compressed message, so H is the same on every rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class TemporalNoise:
    """H by parameter name. `observe` each gradient, `commit` when the step happened, `update` with the averages.

    Keeps two copies of the last gradient, so that a step that did not happen leaves no trace.
    """

    def __init__(self, beta2: float) -> None:
        self.beta2 = beta2
        self.noise: dict[str, float] = {}
        self._previous: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}
        self._divide_by: int | None = None

    def observe(self, name: str, gradient: Tensor) -> Tensor:
        """||gradient - previous||^2 as a float32 scalar; NaN when there is no previous gradient (n,)."""
        previous = self._previous.get(name)
        self._current[name] = gradient.detach().to(torch.float32, copy=True)
        if previous is None:
            return torch.full((), math.nan, device=gradient.device)
        difference: Tensor = torch.linalg.vector_norm(self._current[name] - previous)
        return difference.square()

    def commit(self) -> None:
        """The gradients observed since the last commit were applied: they are the previous ones now."""
        self._previous.update(self._current)
        self._current = {}

    def update(self, squared_differences: dict[str, float], divide_by: int) -> None:
        """Takes each parameter's squared difference, averaged over workers, into H; NaN says nothing.

        Nor does the first difference after `divide_by` changed: it is between gradients of two kinds.
        """
        switched = self._divide_by not in (None, divide_by)
        self._divide_by = divide_by
        if switched:
            return
        for name, value in squared_differences.items():
            if not math.isfinite(value):
                continue
            value /= divide_by
            before = self.noise.get(name)
            self.noise[name] = value if before is None else self.beta2 * before + (1 - self.beta2) * value

    def state_dict(self) -> dict[str, Any]:
        return {"noise": dict(self.noise), "previous": dict(self._previous), "divide_by": self._divide_by}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.noise = dict(state["noise"])
        self._previous = dict(state["previous"])
        self._divide_by = state["divide_by"]
        self._current = {}
