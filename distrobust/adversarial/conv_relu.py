"""A convolution and the relu after it in one call of oneDNN, for attacks on a CPU.

A relu of its own is one more pass over the convolution's result, bound by memory. oneDNN applies it before the result
is written. torch has the call for inference (torch.ops.mkldnn) and no derivative of it, which is

    dL/dx = conv_backward(dL/dy where y > 0)

Only the input gets a gradient: an attack needs no other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def is_available() -> bool:
    """Whether this build of torch has the fused call."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


class ConvReLU(nn.Module):
    """relu(conv(x)) for x on a CPU, float32 or under autocast; conv: without gradients to its parameters."""

    def __init__(self, conv: _ConvNd) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        weight, bias = self.conv.weight.to(kind), self.conv.bias
        with torch.autocast("cpu", enabled=False):
            y: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
                x.to(kind), weight, None if bias is None else bias.to(kind), self.conv
            )
        return y


def can_be_fused(conv: _ConvNd) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and is_available()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, conv: _ConvNd) -> Tensor:
        shape = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, "relu", [], "")
        ctx.save_for_backward(x, weight, y)
        ctx.conv = conv
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, y = ctx.saved_tensors
        conv = ctx.conv
        inner = torch.ops.aten.threshold_backward(gradient, y, 0)
        output_padding = [0] * len(conv.stride)
        layout = (list(conv.stride), list(conv.padding), list(conv.dilation), False, output_padding, conv.groups)
        found: Tensor = torch.ops.aten.convolution_backward(inner, x, weight, None, *layout, [True, False, False])[0]
        return found, None, None, None
