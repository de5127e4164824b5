"""Where each parameter's shard lies in what FSDP2 reduces: one flat tensor a layer, as torch hands it to its hook.

    reduce_output, one fully_shard'ed module:   | shard of p0 | padding | shard of p1 | padding | ...
    shard: row-major, of the size of DTensor.to_local(); padding: up to the largest shard of that parameter

The order of parameters in reduce_output is torch's own and not public: `find` reads it (torch 2.13), and
tests/comm/test_fsdp.py compares the result with an unsharded run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from distrobust.compression import memory
from distrobust.compression.memory import Residual
from distrobust.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Piece:
    """This rank's shard of one parameter, from `start` in reduce_output; `size` elements, perhaps none."""

    name: str
    parameter: Parameter
    residual: Residual
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size

    def weight(self) -> Tensor:
        """(size,), row-major like the gradient."""
        return local(self.parameter.detach()).reshape(-1)


@dataclass(frozen=True, eq=False)
class Layer:
    """One module that fully_shard was called on; `numel` of its reduce_output, padding included."""

    name: str
    pieces: list[Piece]
    numel: int


def find(model: FSDPModule) -> list[tuple[str, FSDPModule, dict[str, Parameter]]]:
    """Of every sharded module: name, itself, and its trainable parameters in the order of reduce_output."""
    assert isinstance(model, torch.nn.Module)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        groups = module._get_fsdp_state()._fsdp_param_groups
        if len(groups) > 1:
            raise ConfigError(f"layer {name!r}: its parameters are sharded over several meshes, wanted one")
        for group in groups:
            _check_group(name, group)
            named = {
                names[p.sharded_param]: p.sharded_param for p in group.fsdp_params if p.sharded_param.requires_grad
            }
            if named:
                found.append((name, module, named))
    if not found:
        raise ConfigError("compress_sharded: the model has no sharded parameter that requires a gradient")
    covered = {name for _, _, named in found for name in named}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and name not in covered]
    if outside:
        raise ConfigError(
            f"{len(outside)} parameters are not sharded, first {outside[0]!r}, and would differ between machines: call "
            "fully_shard on the whole model too"
        )
    return found


def _check_group(name: str, group: Any) -> None:
    if group._is_hsdp:
        raise ConfigError(
            f"layer {name!r}: fully_shard was given a mesh of two dimensions, so torch sums between machines itself, "
            "dense, before the hook; wanted the mesh inside the machine alone, e.g. mesh['gpu']"
        )
    policy = group.mp_policy
    if torch.float16 in (policy.param_dtype, policy.reduce_dtype):
        raise ConfigError(
            f"layer {name!r}: gradients in float16 are divided once more after the hook and need a loss scale, which "
            "residuals would not follow; wanted float32 or bfloat16 in MixedPrecisionPolicy"
        )
    if isinstance(group.offload_policy, CPUOffloadPolicy):
        raise ConfigError(
            f"layer {name!r}: parameters are offloaded to the CPU, their residuals cannot be; wanted none"
        )


def padded_numel(parameter: Parameter) -> int:
    """Elements of reduce_output that belong to this parameter, on every rank alike."""
    assert isinstance(parameter, DTensor)
    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    length = parameter.shape[placement.dim]
    return math.ceil(length / parameter.device_mesh.size()) * (parameter.numel() // length)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def remove_sent(layer: Layer, indices: Tensor, sent: Tensor) -> None:
    """Takes `sent` (k,) at `indices` (k,) of reduce_output out of the layer's residuals."""
    ends = torch.tensor([piece.end for piece in layer.pieces], device=indices.device)
    counts = torch.searchsorted(indices, ends).diff(prepend=ends.new_zeros(1)).tolist()
    for piece, s, values in zip(layer.pieces, indices.split(counts), sent.split(counts), strict=True):
        memory.remove_sent(piece.residual, s, values, piece.start)
