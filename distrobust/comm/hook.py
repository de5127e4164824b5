"""The DDP communication hook: the only file that knows GradBucket.

No `from __future__ import annotations` here: torch compares the hook's annotations with its own types on registration.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distrobust.comm import takeover
from distrobust.comm.exchange import Observer, Settings
from distrobust.comm.flat import flat_like
from distrobust.comm.state import Compression
from distrobust.comm.transport import Transport
from distrobust.compression.codec import VALUE_CODES
from distrobust.compression.select import SELECTORS
from distrobust.compression.warmup import LADDER, Warmup
from distrobust.errors import ConfigError

_log = logging.getLogger(__name__)

FUSE_BELOW = 2048  # elements: biases and norms, which together hold 0.2 % of ResNet-50


def compression_hook(state: Compression, bucket: GradBucket) -> Future[Tensor]:
    """hook(state, bucket) -> Future of the bucket's flat mean, for DistributedDataParallel.register_comm_hook."""
    buffer = bucket.buffer()
    parts = []
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        start = int(gradient.storage_offset() - buffer.storage_offset())
        parts.append(state.part(parameter, start, buffer[start : start + gradient.numel()]))
    return state.reduce(buffer, parts, is_first=bucket.index() == 0, is_last=bucket.is_last())


def attach(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    density: float,
    *,
    num_steps: int | None = None,
    warmup: float = 0.2,
    ladder: tuple[float, ...] = LADDER,
    values: str = "fp16",
    selector: str = "sampled",
    momentum: str = "residual",
    masking: bool = True,
    clip: float | None = None,
    fuse_below: int = FUSE_BELOW,
    scaler: Any = None,
    observer: Observer | None = None,
    transport: Transport | None = None,
) -> Compression:
    """See `distrobust.compress`, which is this."""
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(f"compress: got a {type(model).__name__}, wanted a model wrapped in DistributedDataParallel")
    _choose("compress.values", values, VALUE_CODES)
    _choose("compress.selector", selector, SELECTORS)
    _choose("compress.momentum", momentum, {"residual": None, "optimizer": None})
    if not 0.0 <= warmup <= 1.0:
        raise ConfigError(f"compress.warmup: got {warmup}, wanted a share of the run from 0 to 1")
    if clip is not None and not clip > 0.0:
        raise ConfigError(f"compress.clip: got {clip}, wanted a norm above 0, or None for no clipping")
    schedule = Warmup(density, round(warmup * (num_steps or 0)), ladder)
    if num_steps is None and warmup and density < ladder[0]:
        _log.warning("compress: no warm-up, because the length of the run is unknown; pass num_steps=")
    ignored = model.parameters_to_ignore
    parameters = {
        name: parameter
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad and name not in ignored
    }
    if momentum == "residual":
        taken = takeover.take_over(optimizer, parameters, masking=masking, clip=clip)
    else:
        taken = takeover.leave_in_place(optimizer, parameters, clip=clip)
    settings = Settings(
        transport=transport or Transport(model.process_group),
        code=VALUE_CODES[values],
        select=SELECTORS[selector],
        detect_unused=bool(model.find_unused_parameters or model.static_graph),
        observer=observer,
    )
    scale: Callable[[], float] | None = scaler.get_scale if scaler is not None else None
    state = Compression(parameters, taken.rules, settings, schedule, fuse_below=fuse_below, scale=scale)
    for name, buffer in taken.momentum_buffers.items():
        state.residuals[name].u.copy_(flat_like(buffer, parameters[name]))
    model.register_comm_hook(state, compression_hook)
    if momentum == "residual":
        takeover.empty_(optimizer, taken)
        optimizer.register_step_pre_hook(lambda *_: takeover.refuse_return(optimizer))
    optimizer.register_step_pre_hook(lambda *_: state.drop_gradients_if_skipped())
    return state


def _choose(path: str, value: str, table: dict[str, Any]) -> None:
    if value not in table:
        raise ConfigError(f"{path}: got {value!r}, wanted one of {', '.join(table)}")
