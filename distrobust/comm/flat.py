"""Parameters as flat vectors in the order of DDP's buckets, whatever their memory format."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense_layout(parameter: Tensor) -> bool:
    """Whether DDP gives this parameter's gradient the parameter's own strides within the bucket."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(parameter))


def flat(parameter: Tensor) -> Tensor:
    """(n,) in the order of the bucket: the parameter's storage order where it is dense. A view if it can be one."""
    if is_dense_layout(parameter):
        return parameter.as_strided((parameter.numel(),), (1,), parameter.storage_offset())
    return parameter.reshape(-1)


def unflat(values: Tensor, parameter: Tensor) -> Tensor:
    """Inverse of `flat`: (n,) in bucket order -> a contiguous copy in the parameter's shape."""
    if is_dense_layout(parameter):
        return values.as_strided(parameter.shape, parameter.stride()).clone(memory_format=torch.contiguous_format)
    return values.view(parameter.shape).clone()


def flat_like(values: Tensor, parameter: Tensor) -> Tensor:
    """`values` in the parameter's shape -> (n,) in the parameter's bucket order."""
    if not is_dense_layout(parameter):
        return values.detach().reshape(-1)
    shaped = torch.empty_like(parameter, dtype=values.dtype)
    return flat(shaped.copy_(values.detach()))
