"""Annealed Gaussian noise on gradients.

Neelakantan et al., 2015 (arXiv 1511.06807), section 2:   g <- g + N(0, sigma_t^2),   sigma_t^2 = eta / (1 + t)^0.55

Added to the mean after the exchange, so it costs no bytes, and drawn from the same generator on every rank, so all add
the same: the noise of one worker, not averaged down. Under momentum in the residual the mean already holds the
momentum, and the noise is not accumulated in it; the paper's is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

GAMMA = 0.55


def sigma(step: int, eta: float) -> float:
    """Standard deviation of every coordinate's noise at a step, counted from 0."""
    return math.sqrt(eta / (1.0 + step) ** GAMMA)


@torch.no_grad()
def add_noise_(gradients: Iterable[Tensor], step: int, eta: float, generator: torch.Generator) -> None:
    """Adds to `gradients`, which are changed, in their order; the generator is on their device."""
    for gradient in gradients:
        noise = torch.empty(gradient.shape, dtype=torch.float32, device=gradient.device).normal_(generator=generator)
        gradient.add_(noise.to(gradient.dtype), alpha=sigma(step, eta))
