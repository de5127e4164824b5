"""A model as one flat vector a client, and the gradients of a whole cohort at once.

`Layered`: flatten, linear and ReLU layers by hand, as batched matrix products. `Mapped`: any other network without
state, by torch.func.vmap; a cohort of one goes through ordinary autograd. Batch norm is refused: its running
statistics are state that no two clients share, and a global model would be evaluated with nobody's (Hsieh et al.,
ICML 2020, section 5); group norm (`cnn_gn`) does not have it. So is dropout, which draws from torch's global generator.

A batched matrix product may add in another order than the same product alone. For C clients at once against one after
the other each gradient differs by at most a few units of 2^-24 of the sum of its terms' magnitudes; nothing else
depends on the cohort. (Equal to the bit where the BLAS treats every matrix of a batch alike.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from distrobust.errors import ModelError
from distrobust.models import Normalise

Stacked = list[Tensor]  # every parameter of C clients: (C, *shape), in the model's order


class Network(Protocol):
    """What local training needs of a model. x (C, B, channels, height, width) float in [0, 1], y, weights (C, B)."""

    spec: Spec
    fallback: str  #: why it is not done by hand; empty if it is

    def logits(self, parameters: Stacked, x: Tensor) -> Tensor:
        """(C, B, classes)"""
        ...

    def gradients(self, parameters: Stacked, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Stacked, Tensor]:
        """Of each client's cross-entropy, summed with `weights`; and that loss (C,)."""
        ...


class Spec:
    """Where each parameter lies in the flat vector."""

    def __init__(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        self.names = list(parameters)
        self.shapes = [p.shape for p in parameters.values()]
        self.sizes = [p.numel() for p in parameters.values()]
        self.n = sum(self.sizes)

    def stacked(self, vectors: Tensor) -> Stacked:
        """(C, n) -> views."""
        pieces = vectors.split(self.sizes, dim=1)
        return [piece.unflatten(1, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def vectors(self, stacked: Stacked) -> Tensor:
        """The inverse, a copy: (C, n)."""
        return torch.cat([one.flatten(1) for one in stacked], dim=1)


def flat(module: nn.Module) -> Tensor:
    """(n,) float32: the module's parameters, a copy."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def load_(module: nn.Module, vector: Tensor) -> nn.Module:
    """Writes a flat vector into the module's parameters."""
    with torch.no_grad():
        parameters = list(module.parameters())
        for parameter, values in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(values.view_as(parameter))
    return module


def network(module: nn.Module) -> Network:
    """Raises ModelError for a model that keeps state between batches or draws random numbers."""
    for name, inner in module.named_modules():
        if isinstance(inner, nn.modules.batchnorm._NormBase) and inner.track_running_stats:
            raise ModelError(
                f"model: layer {name!r} is {type(inner).__name__}, whose running statistics clients cannot share; "
                "wanted a network without it, such as cnn_gn"
            )
        if isinstance(inner, nn.modules.dropout._DropoutNd) and inner.p > 0:
            raise ModelError(f"model: layer {name!r} is dropout, whose draws would not be the clients' own; set p to 0")
    layers = list(module.children()) if isinstance(module, nn.Sequential) else []
    kinds = "".join(_letter(layer) for layer in layers)
    if re.fullmatch("N*F(LR?)+", kinds):
        return Layered(module, layers)
    strange = next((layer for layer in layers if _letter(layer) == "?"), module)
    return Mapped(module, f"no hand-written batched form of {type(strange).__name__}")


def _letter(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "L" if layer.bias is not None else "?"
    kinds = {Normalise: "N", nn.Flatten: "F", nn.ReLU: "R"}
    return kinds.get(type(layer), "?")


class Layered:
    """A chain of normalisation, flatten, linear and ReLU layers."""

    fallback = ""

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.spec = Spec(module)
        self._normalise = [layer for layer in layers if isinstance(layer, Normalise)]
        linear = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
        self._relu = [isinstance(layer, nn.ReLU) for layer in (*(layers[i + 1] for i in linear[:-1]), layers[-1])]

    def logits(self, parameters: Stacked, x: Tensor) -> Tensor:
        return self._forward(parameters, x)[-1]

    def _forward(self, parameters: Stacked, x: Tensor) -> list[Tensor]:
        """The input of every linear layer, and the logits."""
        for layer in self._normalise:
            x = (x - layer.mean) / layer.std
        y = [x.flatten(2)]
        for i, relu in enumerate(self._relu):
            W, b = parameters[2 * i], parameters[2 * i + 1]
            z = torch.baddbmm(b[:, None], y[-1], W.transpose(1, 2))
            y.append(z.relu() if relu else z)
        return y

    def gradients(self, parameters: Stacked, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Stacked, Tensor]:
        inputs = self._forward(parameters, x)
        log_p = torch.log_softmax(inputs.pop(), dim=2)
        target = y[:, :, None]
        loss = -(log_p.gather(2, target)[:, :, 0] * weights).sum(1)
        d = log_p.exp_()
        d.scatter_add_(2, target, d.new_full((1,), -1.0).expand(target.shape))
        d.mul_(weights[:, :, None])
        gradients: Stacked = []
        for i in reversed(range(len(self._relu))):
            gradients[:0] = [torch.bmm(d.transpose(1, 2), inputs[i]), d.sum(1)]
            if i:
                d = torch.bmm(d, parameters[2 * i])
                if self._relu[i - 1]:
                    d = torch.ops.aten.threshold_backward(d, inputs[i], 0.0)
        return gradients, loss


class Mapped:
    """Any module whose forward is a function of parameters and input alone."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        self.spec, self.fallback = Spec(module), reason
        self._module = module
        self._buffers = dict(module.named_buffers())

        def loss(parameters: Stacked, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
            each = F.cross_entropy(self._forward(parameters, x), y, reduction="none")
            return (each * weights).sum()

        self._loss = loss
        self._mapped = vmap(grad_and_value(loss))

    def _forward(self, parameters: Stacked, x: Tensor) -> Tensor:
        named = dict(zip(self.spec.names, parameters, strict=True))
        result: Tensor = functional_call(self._module, {**named, **self._buffers}, (x,))
        return result

    def logits(self, parameters: Stacked, x: Tensor) -> Tensor:
        result: Tensor = vmap(self._forward)(parameters, x)
        return result

    def gradients(self, parameters: Stacked, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Stacked, Tensor]:
        if len(x) > 1:
            gradients, loss = self._mapped(parameters, x, y, weights)
            return list(gradients), loss
        alone = [p[0].detach().requires_grad_() for p in parameters]
        with torch.enable_grad():
            value = self._loss(alone, x[0], y[0], weights[0])
        return [g[None] for g in torch.autograd.grad(value, alone)], value.detach()[None]


def is_finite(vectors: Tensor) -> Tensor:
    """(C, n) -> (C,) bool, by the sums: one that overflows in float32 does not count as finite either."""
    return torch.isfinite(vectors.sum(dim=1))
