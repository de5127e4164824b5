"""Adversarial weight perturbation: the loss is trained at the worst weights near by (Wu, Xia and Wang, NeurIPS 2020).

    w' = w + gamma ||w|| g / ||g||,  g = gradient of the loss on x' at w, one step of ascent

for every parameter with two or more dimensions, each by itself; the gradient that trains is taken at w' and applied to
w.

Under data parallelism every rank perturbs by its own share of the batch, as sharpness-aware minimisation does (Foret et
al. 2021); nothing is sent for it. A weight decay that is added to the gradient meets w', not w: a difference of gamma
of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def perturbed_weights(model: nn.Module, loss: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Inside, `model`'s weights are w'; afterwards w, to the bit, whatever happened: nothing else may move them inside
    (Compression.staying_ahead).

    model: the inner module, on which `loss()` computes its scalar. No autocast region may reach over the border: it
    keeps casts of w. No .grad is touched, no hook fires, buffers stay. Where g is zero or not finite, w' = w.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    buffers = list(model.buffers())
    kept = [buffer.clone() for buffer in buffers]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    if buffers:
        with torch.no_grad():
            torch._foreach_copy_(buffers, kept)
    pairs = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
    before = [w.detach().clone() for w, _ in pairs]
    try:
        with torch.no_grad():
            for w, g in pairs:
                length = torch.linalg.vector_norm(g)
                step = gamma * torch.linalg.vector_norm(w) / length * g
                w.add_(torch.where(torch.isfinite(length) & (length > 0), step, 0.0))
        yield
    finally:
        with torch.no_grad():
            for (w, _), old in zip(pairs, before, strict=True):
                w.copy_(old)
