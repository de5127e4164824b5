"""Where attacks live: the points an example is moved among, and modules as functions of them.

    images   x, (B, C, H, W) in [0, 1]; f(x) is the module itself
    text     x = embed(tokens), (B, L, D); f(x') = module(tokens, x' - x)

The second is adversarial training in embedding space (Miyato et al. 2017; FreeLB, Zhu et al. 2020): the embedding is
trained through x and never through the perturbation, and the module may be the DistributedDataParallel wrapper. As in
FreeLB's code a ball is one of the whole text, all positions and dimensions together, whatever its length, and padding
is not moved. Differences from FreeLB: attacks start anywhere in the ball, FreeLB's near its middle; and the weights
learn from the last point, FreeLB's from the mean of all points on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distrobust.adversarial.threat import OpenThreat, Threat


@runtime_checkable
class Embeds(Protocol):
    """A model of tokens (B, L) that says where they lie: model(tokens, delta) -> logits, delta (B, L, D) or None."""

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L, D)"""

    def is_real(self, tokens: Tensor) -> Tensor:
        """(B, L) bool, False for padding."""


@dataclass(frozen=True)
class Points:
    """One batch. x: its points, detached; tokens: (B, L) of a text, None of images; real: (B, L, 1), 0 at padding."""

    x: Tensor
    tokens: Tensor | None = None
    real: Tensor | None = None

    @staticmethod
    def of(net: nn.Module, inputs: Tensor) -> Points:
        """net: the inner module. inputs: images in [0, 1], or tokens for a model that embeds them."""
        if not isinstance(net, Embeds):
            return Points(inputs)
        with torch.no_grad():
            x = net.embed(inputs)
            return Points(x, inputs, net.is_real(inputs)[:, :, None].to(x.dtype))

    def seen_by(self, module: nn.Module) -> nn.Module:
        """points -> logits. module: the inner module, or its wrapper."""
        return module if self.tokens is None else Moved(module, self.tokens, self.x)

    def ball(self, threat: Threat) -> Threat:
        """`threat` around these points."""
        return threat if self.tokens is None else OpenThreat(threat.norm, threat.eps, self.real)


class Moved(nn.Module):
    """Points (k B, L, D) -> module(tokens, points - x): the batch, k times over with its points moved."""

    def __init__(self, module: nn.Module, tokens: Tensor, x: Tensor) -> None:
        super().__init__()
        self.module, self.tokens, self.x = module, tokens, x

    def forward(self, points: Tensor) -> Tensor:
        times = len(points) // max(1, len(self.x))
        moved = points - self.x.repeat(times, 1, 1)
        return torch.as_tensor(self.module(self.tokens.repeat(times, 1), moved))
