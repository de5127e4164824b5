"""One bucket in a dense phase: an all-reduce, and the momentum applied here instead of in the optimizer.

Switching between dense and sparse therefore keeps the momentum, and a dense phase is DistributedDataParallel with
torch.optim.SGD, to the bit while residuals are settled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from distrobust.comm.exchange import Mean, Part, Settings, Step, had_gradient, unscaled
from distrobust.compression import memory


def launch_dense(settings: Settings, step: Step, bucket: Tensor, parts: list[Part]) -> Future[Any]:
    """The Future of a Mean that holds the step to take, momentum included.

    While residuals are settled the gradient itself is reduced, in the order of DDP's own all-reduce, so that the bits
    agree too. Otherwise v and u are reduced once, side by side, which settles them and loses nothing.
    """
    if all(part.residual.settled for part in parts):
        return _reduce_gradient(settings, bucket, parts, step.scale)
    return _reduce_residual(settings, bucket, parts, step.scale)


def _reduce_gradient(settings: Settings, bucket: Tensor, parts: list[Part], scale: float) -> Future[Any]:
    transport = settings.transport
    for part in parts:
        if part.residual.rule.clip is not None:
            rule = memory.Rule(clip=part.residual.rule.clip * scale)
            part.gradient.copy_(memory.local_gradient(part.gradient, part.weight, rule, transport.num_ranks))
    bucket.mul_(1.0 / transport.num_ranks)  # as DDP itself: with three ranks a division has other bits

    def finish(future: Future[Any]) -> Mean:
        reduced = future.value()
        if not bool(torch.isfinite(reduced.sum(dtype=torch.float32))):
            return Mean(None)
        mean = torch.empty(bucket.numel(), device=bucket.device)
        result = Mean(mean)
        for part in parts:
            gradient = unscaled(part, scale)
            result.used[part.name] = bool(had_gradient(settings, gradient))
            if settings.observer is not None:
                result.side[part.name] = float(settings.observer.observe(part.name, gradient))
            decay = memory.Rule(weight_decay=part.residual.rule.weight_decay)
            decayed = memory.local_gradient(gradient, part.weight, decay, 1)
            mean[part.start : part.end] = memory.velocity(part.residual, decayed)
        return result

    return transport.all_reduce(bucket).then(finish)


def _reduce_residual(settings: Settings, bucket: Tensor, parts: list[Part], scale: float) -> Future[Any]:
    transport = settings.transport
    used = torch.ones(len(parts), device=bucket.device)
    for i, part in enumerate(parts):
        gradient = unscaled(part, scale)
        used[i] = had_gradient(settings, gradient)
        local = memory.local_gradient(gradient, part.weight, part.residual.rule, transport.num_ranks)
        memory.accumulate(part.residual, local)
    halves = [part.residual.next_v for part in parts] + [part.residual.next_u for part in parts]
    packed = torch.cat([*halves, used]).div_(transport.num_ranks)

    def finish(future: Future[Any]) -> Mean:
        reduced = future.value()
        if not bool(torch.isfinite(reduced.sum())):
            return Mean(None)
        pieces = reduced.split([*(half.numel() for half in halves), len(parts)])
        mean = torch.empty(bucket.numel(), device=bucket.device)
        result = Mean(mean)
        for i, part in enumerate(parts):
            result.used[part.name] = bool(pieces[-1][i] > 0)
            mean[part.start : part.end] = pieces[i]
            part.residual.next_v.zero_()
            part.residual.next_u.copy_(pieces[len(parts) + i])
        return result

    return transport.all_reduce(packed).then(finish)
