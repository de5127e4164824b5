"""The DDP communication hook: the only file that knows GradBucket.

No `from __future__ import annotations` here: torch compares the hook's annotations with its own types on registration.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from distrobust.comm import choice, link, takeover
from distrobust.comm.bucket import Observer, Settings
from distrobust.comm.flat import flat_like
from distrobust.comm.state import Compression
from distrobust.comm.transport import Transport
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES, Code
from distrobust.compression.density import LADDER, Schedule, for_budget, planned
from distrobust.compression.select import SELECTORS
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
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    density: float | str,
    *,
    num_steps: int | None = None,
    fewer_bytes: float | None = None,
    exchange_s: float | None = None,
    warmup: float | None = None,
    ladder: tuple[float, ...] = LADDER,
    final_steps: int = 0,
    final_density: float = 1.0,
    step_ahead: bool = False,
    values: str = "4bit",
    indices: str = "elias_fano",
    exchange: str = "auto",
    selector: str = "sampled",
    momentum: str = "residual",
    masking: bool | None = None,
    clip: float | None = None,
    fuse_below: int = FUSE_BELOW,
    scaler: Any = None,
    transport: Transport | None = None,
    register: bool = True,
) -> Compression:
    """See `distrobust.compress`, which is this. `register`: False where a Deferred stands in as the hook's state."""
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(f"compress: got a {type(model).__name__}, wanted a model wrapped in DistributedDataParallel")
    _choose("compress.values", values, VALUE_CODES)
    _choose("compress.indices", indices, INDEX_CODES)
    _choose("compress.exchange", exchange, dict.fromkeys(choice.NAMES))
    _choose("compress.selector", selector, SELECTORS)
    _choose("compress.momentum", momentum, {"residual": None, "optimizer": None})
    warmup = (0.0 if step_ahead else 0.2) if warmup is None else warmup
    masking = not step_ahead if masking is None else masking
    if clip is not None and not clip > 0.0:
        raise ConfigError(f"compress.clip: got {clip}, wanted a norm above 0, or None for no clipping")
    budgets = [value for value in (fewer_bytes, exchange_s) if value is not None and value > 0.0]
    if isinstance(density, str) and (density != "auto" or len(budgets) != 1):
        raise ConfigError(
            f"compress.density: got {density!r} with fewer_bytes={fewer_bytes} and exchange_s={exchange_s}; wanted a "
            "number, or 'auto' and one of the two budgets, above 0"
        )
    first = density if not isinstance(density, str) else 1e-6
    schedule = planned(first, num_steps, warmup, ladder, final_steps, final_density)
    ignored = model.parameters_to_ignore
    parameters = {
        name: parameter
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad and name not in ignored
    }
    _refuse_gradients_that_are_no_float_vectors(model.module, parameters)
    optimizers = takeover.unwrapped(optimizer)
    if step_ahead and momentum == "optimizer":
        _refuse_all_but_sgd_ahead(optimizers)
    if momentum == "residual":
        taken = takeover.take_over(optimizers, parameters, masking=masking, clip=clip)
    else:
        taken = takeover.leave_in_place(optimizers, parameters, clip=clip)
    adaptive = takeover.noise_adaptive(optimizer)
    measures = adaptive is not None and adaptive.noise is not None
    wants = {"step-ahead": step_ahead, "noise": measures, "clip": clip is not None, "dense": density == 1.0}
    needs = next((name for name, is_so in wants.items() if is_so), "")
    chosen = choice.choose(exchange, _group_of(model), transport, needs, next(iter(parameters.values())).device)
    _refuse_combinations(chosen, step_ahead, measures, clip)
    observer: Observer | None = None
    if adaptive is not None:
        observer = adaptive.observer_for(chosen.transport.num_ranks, density == 1.0, parameters)
    if transport is None or transport.num_ranks > 1:
        _log.info("compress: exchange %s (%s)", chosen.exchange, chosen.reason)
    settings = Settings(
        transport=chosen.transport,
        code=Code(VALUE_CODES[values], INDEX_CODES[indices]),
        selector=selector,
        detect_unused=bool(model.find_unused_parameters or model.static_graph),
        observer=observer,
        exchange=chosen.exchange,
    )
    scaler = takeover.scaler_of(optimizer) if scaler is None else scaler
    scale: Callable[[], float] | None = scaler.get_scale if scaler is not None else None
    rates = _rates_of(optimizers, parameters, adaptive) if step_ahead else None
    state = Compression(parameters, taken.rules, settings, schedule, fuse_below=fuse_below, scale=scale, rates=rates)
    if isinstance(density, str):
        state.density = _within_budget(state, schedule, fewer_bytes, exchange_s)
        state.measured_for = exchange_s
    for name, buffer in taken.momentum_buffers.items():
        state.residuals[name].u.copy_(flat_like(buffer, parameters[name]))
    if register:
        model.register_comm_hook(state, compression_hook)
    acts = [state.drop_gradients_if_skipped, state.step_back, state.spend]
    takeover.complete_(optimizers, taken, momentum == "residual", acts)
    model.register_forward_pre_hook(
        lambda module, _: state.refuse_unspent_gradients() if module.training and torch.is_grad_enabled() else None
    )
    if step_ahead:
        model.register_forward_pre_hook(lambda module, _: state.step_ahead() if module.training else state.step_back())
    return state


def _within_budget(
    state: Compression, schedule: Schedule, fewer_bytes: float | None, exchange_s: float | None
) -> Schedule:
    """The densest schedule within a number of bytes for the run, or within a time on the measured link a step."""
    if fewer_bytes is not None:
        found = for_budget(schedule, schedule.num_steps * state.step_bytes(1.0) / fewer_bytes, state.step_bytes)
        _log.info("compress: density %.4g for %.4g times fewer bytes than dense", found.density, fewer_bytes)
        return found
    assert exchange_s is not None
    device = next(iter(state.parameters.values())).device
    measured = link.measure(state.settings.transport, device)
    step_bytes = max(0.0, exchange_s - measured.latency_s) * measured.bytes_per_s
    one_step = replace(schedule, num_steps=1, warmup_steps=0, final_steps=0)
    found = replace(schedule, density=for_budget(one_step, step_bytes, state.step_bytes).density)
    _log.info(
        "compress: density %.4g for %.4g s a step on a link of %.4g Mbit/s, latency %.2g s",
        found.density,
        exchange_s,
        measured.bytes_per_s * 8e-6,
        measured.latency_s,
    )
    return found


def _group_of(model: DistributedDataParallel) -> ProcessGroup | None:
    """None for the default group, of which others can be made."""
    group: ProcessGroup = model.process_group
    return None if dist.is_initialized() and group == dist.group.WORLD else group


def _refuse_combinations(chosen: choice.Choice, step_ahead: bool, measures: bool, clip: float | None) -> None:
    levels = chosen.transport.local is not None
    if step_ahead and (levels or chosen.exchange != "all_gather"):
        raise ConfigError(
            "compress.step_ahead: a worker's residual must be its own; in a sharded or hierarchical exchange it holds "
            "other workers' updates too; set compress.exchange to all_gather"
        )
    if clip is not None and levels:
        raise ConfigError(
            "compress.clip: a worker knows the norm of only a piece of each gradient in a hierarchical exchange; set "
            "compress.exchange to all_gather or sharded, or compress.clip to null"
        )
    if measures and levels:
        raise ConfigError(
            "noise: a worker sees only a piece of each gradient in a hierarchical exchange; set compress.exchange to "
            "all_gather or sharded, or noise to null"
        )


def _refuse_all_but_sgd_ahead(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for one in optimizers:
        if type(one) is not torch.optim.SGD:
            raise ConfigError(
                f"compress.step_ahead: got optimizer {type(one).__name__}, wanted torch.optim.SGD, whose pending "
                "update alone is its rate times the residual; leave step_ahead off"
            )


def _rates_of(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: dict[str, Parameter],
    adaptive: takeover.NoiseAdaptive | None,
) -> Callable[[], dict[str, float]]:
    """Reads each parameter's learning rate when called."""
    names = {parameter: name for name, parameter in parameters.items()}

    def rates() -> dict[str, float]:
        ratios = adaptive.ratios if adaptive is not None else {}
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = {names[p]: float(group["lr"]) for group in groups for p in group["params"] if p in names}
        return {name: rate * float(ratios.get(name, 1.0)) for name, rate in rates.items()}

    return rates


def _refuse_gradients_that_are_no_float_vectors(module: torch.nn.Module, parameters: dict[str, Any]) -> None:
    for name, parameter in parameters.items():
        if parameter.is_complex():
            raise ConfigError(
                f"compress: parameter {name!r} is complex ({parameter.dtype}), wanted real numbers; keep its real and "
                "imaginary parts as one real parameter (torch.view_as_real)"
            )
    for name, inner in module.named_modules():
        if isinstance(inner, torch.nn.Embedding | torch.nn.EmbeddingBag) and inner.sparse:
            raise ConfigError(
                f"compress: embedding {name!r} has sparse gradients, wanted dense ones; make it with sparse=False: the "
                "rows a batch did not touch are not sent anyway"
            )


def _choose(path: str, value: str, table: dict[str, Any]) -> None:
    if value not in table:
        raise ConfigError(f"{path}: got {value!r}, wanted one of {', '.join(table)}")
