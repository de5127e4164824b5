"""The same function for less: a model in evaluation mode, with every batch norm folded into the convolution before it.

In evaluation mode a batch norm is a constant scale and shift for each channel, and

    norm(conv(x; w, b)) = conv(x; w s, b s + beta - mean s),    s = gamma / sqrt(var + eps)

An attack passes forward and backward through the model many times between two changes of the weights. On a CPU a relu
right after such a convolution is made part of it, too (conv_relu.py). Training passes are not touched.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from distrobust.adversarial.attacks import evaluation_mode
from distrobust.adversarial.conv_relu import ConvReLU, can_be_fused

_log = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RELUS = ("relu", "relu_", torch.relu, torch.relu_, nn.functional.relu)
_NOTHING_TO_FOLD = "no batch norm follows a convolution"
_TOLERANCE = 1e-3  # of the largest logit: rounding, not another function


class Folded:
    """`current()` is the twin of `model` with its present weights and statistics; all other layers are shared with it,
    their training flags too: as with the model itself, whoever runs it sees to evaluation mode.

    x (B, ...): some inputs, on which the twin is compared with the model once. Where the model cannot be traced, has
    forward hooks (which a twin would not call), has nothing to fold or computes something else, `current()` is the
    model itself, and the reason is logged.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        self._twin: fx.GraphModule | None = None
        self._pairs: list[tuple[_ConvNd, _BatchNorm, _ConvNd]] = []  # convolution, its norm, both in one
        reason = self._build(on_cpu=x.device.type == "cpu")
        if not reason and not self._agrees(x):
            reason = "its traced form computes something else"
        if reason:
            self._twin = None
            _log.info("attacks run on the model as it is, not on one with its batch norms folded: %s", reason)

    def current(self) -> nn.Module:
        if self._twin is None:
            return self.model
        self._refresh()
        return self._twin

    def _build(self, on_cpu: bool) -> str:
        """Makes the twin, or says why not."""
        model = self.model
        if not any(isinstance(module, _BatchNorm) for module in model.modules()):
            return _NOTHING_TO_FOLD  # without a trace, which patches torch for all threads meanwhile
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            return "it has forward hooks"
        try:
            graph = fx.Tracer().trace(copy.deepcopy(model).eval())  # a copy: a forward may keep what it is given
        except Exception as error:  # any code may be in a forward
            return f"it cannot be traced ({' '.join(str(error).split())[:100]})"
        modules = dict(model.named_modules())
        places = [node.target for node in graph.nodes if node.op == "call_module"]
        twin = fx.GraphModule(model, graph)
        for node in list(graph.nodes):
            before = node.args[0] if node.op == "call_module" and node.args else None
            if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
                continue
            conv, norm = modules[str(before.target)], modules[str(node.target)]
            if not isinstance(conv, _ConvNd) or type(conv) not in _CONVOLUTIONS or not isinstance(norm, _BatchNorm):
                continue
            if norm.running_mean is None or places.count(before.target) > 1 or places.count(node.target) > 1:
                continue
            folded = _like(conv)
            self._pairs.append((conv, norm, folded))
            node.replace_all_uses_with(before)
            graph.erase_node(node)
            parent, _, name = str(before.target).rpartition(".")
            setattr(twin.get_submodule(parent), name, _with_relu(folded, before, modules) if on_cpu else folded)
        if not self._pairs:
            return _NOTHING_TO_FOLD
        twin.delete_all_unused_submodules()
        twin.recompile()
        self._twin = twin
        return ""

    @torch.no_grad()
    def _refresh(self) -> None:
        for conv, norm, folded in self._pairs:
            mean, var = norm.running_mean, norm.running_var
            assert mean is not None
            assert var is not None
            weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, var, norm.eps, norm.weight, norm.bias)
            folded.weight, folded.bias = weight.requires_grad_(False), bias.requires_grad_(False)

    @torch.no_grad()
    def _agrees(self, x: Tensor) -> bool:
        twin = self.current()
        with evaluation_mode(self.model), evaluation_mode(twin), torch.autocast(x.device.type, enabled=False):
            ours, theirs = twin(x), self.model(x)
        return bool((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max())


def _with_relu(conv: _ConvNd, node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module:
    """`conv`, or both in one if all that its `node` is used for is a relu, whose node is then removed."""
    (after,) = node.users if len(node.users) == 1 else (node,)
    is_relu = (after.op == "call_module" and type(modules.get(str(after.target))) is nn.ReLU) or (
        after.op in ("call_function", "call_method") and after.target in _RELUS
    )
    if not is_relu or not can_be_fused(conv):
        return conv
    after.replace_all_uses_with(node)
    node.graph.erase_node(after)
    return ConvReLU(conv)


def _like(conv: _ConvNd) -> _ConvNd:
    """The same kind of layer with a bias; its numbers are set later."""
    kept = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    made: _ConvNd = type(conv)(**{name: getattr(conv, name) for name in kept}, bias=True, device="meta")
    return made
