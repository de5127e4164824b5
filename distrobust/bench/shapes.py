"""ResNet-50 by its shapes: 161 parameter tensors, 25,557,032 parameters, and a backward that costs a copy.

A benchmark of the exchange needs the real tensors, biases and norms included, in the order in which a backward pass
finishes them, and gradients that are heavy-tailed and differ from rank to rank and from step to step; it does not need
the convolutions. So `backward` hands out slices of a pool of random numbers: what is timed beside the exchange is one
copy of the gradient into DDP's buckets and 161 hooks, which the benchmark measures as its floor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NUM_TENSORS = 161
NUM_PARAMETERS = 25_557_032

_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width, blocks
_EXPANSION = 4
_SHIFTS, _STRIDE = 4096, 16  # of the pool between steps; 16 floats keep slices aligned to a cache line


class _Block(nn.Module):
    """The bottleneck block: 1x1, 3x3, 1x1, and a projection where the width changes."""

    def __init__(self, inputs: int, width: int, project: bool) -> None:
        super().__init__()
        outputs = width * _EXPANSION
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), _norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, bias=False), _norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), _norm(outputs)
        if project:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), _norm(outputs))


class ResNet50Shape(nn.Module):
    """The parameters of torchvision's resnet50, by the same names. `forward(pool, step)` -> scalar, see `Pool`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, bias=False), _norm(64)
        inputs = 64
        for number, (width, blocks) in enumerate(_STAGES, start=1):
            stage = []
            for block in range(blocks):
                stage.append(_Block(inputs, width, project=block == 0))
                inputs = width * _EXPANSION
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, pool: Pool, step: int) -> Tensor:
        total = torch.zeros(())
        for parameter, gradient in zip(self.parameters(), pool.gradients(list(self.parameters()), step), strict=True):
            total = _Given.apply(total, parameter, gradient)  # type: ignore[no-untyped-call]
        return total


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, track_running_stats=False)  # no buffers, which DDP would broadcast


class _Given(torch.autograd.Function):
    """total -> total, with a gradient for `parameter` that was there before. Chained, backward runs in reverse."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gradient = ctx.gradient
        del ctx.gradient  # autograd then takes it over instead of copying it
        return grads[0], gradient, None


class Pool:
    """Gradients for `num_parameters` coordinates: a normal times a log-normal number, another slice at every step.

    Such a product has the heavy tail of real gradients: its largest 1 % carry half of the energy. The slices
    of two steps are shifted against each other, so a coordinate's gradients are independent from step to step.
    """

    def __init__(self, num_parameters: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        length = num_parameters + _SHIFTS * _STRIDE
        self.values = torch.randn(length, generator=generator).mul_(torch.randn(length, generator=generator).exp_())
        self.values.mul_(1e-3)

    def gradients(self, parameters: list[nn.Parameter], step: int) -> list[Tensor]:
        """One view per parameter, in its shape. Nobody may write into them: use DDP's gradient_as_bucket_view."""
        start = (step * 1031) % _SHIFTS * _STRIDE
        views = []
        for parameter in parameters:
            views.append(self.values[start : start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()
        return views


def share_storage_(models: list[nn.Module]) -> None:
    """Lets all `models`, of equal shapes, use the parameters of the first: nobody trains, and memory is scarce."""
    first = list(models[0].parameters())
    for model in models[1:]:
        for parameter, shared in zip(model.parameters(), first, strict=True):
            parameter.data = shared.data
