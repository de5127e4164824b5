"""tpSGD: training without back-propagation, each layer towards a fixed random projection of the label.

tpSGD (2022, arXiv 2208.08503). Letters: y* one-hot label, P_l projection of layer l,
z_l = W_l x_l + b_l, y_l = relu(z_l):

    delta W_l = eta ((P_l y* - y_l) * relu'(z_l)) x_l^T

One forward pass; nothing is kept beyond a layer. The last layer has no P: it descends the cross-entropy, whose gradient
is local to it. P has entries uniform in [0, 1), functions of the seed and the same for all clients: a ReLU cannot reach
targets below 0. Differences from the paper: the bias learns by the same rule, and P's distribution is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from distrobust.errors import ModelError
from distrobust.federated import draws
from distrobust.federated.draws import Purpose
from distrobust.federated.network import Layered, Network, Stacked


class Projected(Layered):
    """A chain of linear and ReLU layers whose `gradients` are tpSGD's updates, divided by -eta."""

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module], seed: int) -> None:
        super().__init__(module, layers)
        widths = [shape[0] for shape in self.spec.shapes[1::2]]
        self._P = [
            torch.from_numpy(
                draws.uniform(seed, Purpose.PROJECTION, layer, np.arange(widths[-1])[:, None], np.arange(width)).astype(
                    np.float32
                )
            )
            for layer, width in enumerate(widths[:-1])
        ]  # (classes, width): the rows are P's columns

    def gradients(self, parameters: Stacked, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Stacked, Tensor]:
        outputs = self._forward(parameters, x)
        logits = outputs.pop()
        log_p = torch.log_softmax(logits, dim=2)
        target = y[:, :, None]
        loss = -(log_p.gather(2, target)[:, :, 0] * weights).sum(1)
        last = log_p.exp().scatter_add(2, target, log_p.new_full((1,), -1.0).expand(target.shape))
        errors = [
            (h - P[y]) * (h > 0) if relu else h - P[y]
            for h, P, relu in zip(outputs[1:], self._P, self._relu[:-1], strict=True)
        ]
        gradients: Stacked = []
        for inputs, error in zip(outputs, [*errors, last], strict=True):
            d = error * weights[:, :, None]
            gradients += [torch.bmm(d.transpose(1, 2), inputs), d.sum(1)]
        return gradients, loss


def projected(module: nn.Module, found: Network, seed: int) -> Network:
    """tpSGD's form of a network; ModelError if it is not a chain of linear layers."""
    if not isinstance(found, Layered):
        raise ModelError(f"local.gradients: target_projection is for mlp and linear: {found.fallback}")
    return Projected(module, list(module.children()), seed)
