"""One bucket in a dense phase: an all-reduce, and the momentum applied here instead of in the optimizer.

Switching between dense and sparse therefore keeps the momentum, and a dense phase is DistributedDataParallel with
torch.optim.SGD, to the bit while residuals are settled.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch
from torch import Tensor

from distrobust.comm.bucket import Bucket, Exchange, Mean, Settings, Step, Verdict, had_gradients, unscaled
from distrobust.comm.line import Part
from distrobust.comm.transport import AllGather, AllReduce
from distrobust.compression import memory


def dense(settings: Settings, step: Step, bucket: Bucket, verdict: Verdict) -> Exchange:
    """As many hops as `num_hops` says; the Mean holds the step to take, momentum included.

    While residuals are settled the gradient itself is reduced, in the order of DDP's own all-reduce, so that the bits
    agree too. Otherwise v and u are reduced once, side by side, which settles them and loses nothing.
    """
    if _is_settled(bucket.parts):
        return (yield from _reduce_gradient(settings, bucket.flat, bucket.parts, step.scale))
    return (yield from _reduce_residual(settings, bucket.flat, bucket.parts, step.scale))


def num_hops(settings: Settings, parts: list[Part]) -> int:
    """Two where an observer compares each rank's gradient with the mean and every rank gets the numbers of all."""
    observer = settings.observer
    return 2 if observer is not None and observer.wants_mean and observer.is_due and _is_settled(parts) else 1


def _is_settled(parts: list[Part]) -> bool:
    return all(part.residual.settled for part in parts)


def _reduce_gradient(settings: Settings, bucket: Tensor, parts: list[Part], scale: float) -> Exchange:
    num_ranks = settings.transport.num_ranks
    for part in parts:
        if part.residual.rule.clip is not None:
            rule = memory.Rule(clip=part.residual.rule.clip * scale)
            part.gradient.mul_(memory.clip_factor(part.gradient, rule, num_ranks))
    own = bucket.clone() if num_hops(settings, parts) > 1 else None
    bucket.mul_(1.0 / num_ranks)  # as DDP itself: with three ranks a division has other bits
    reduced = yield AllReduce(bucket)
    side = {} if own is None else (yield from _compared(settings, own, parts, scale))
    if not bool(torch.isfinite(reduced.sum(dtype=torch.float32))):
        return Mean(finite=False)
    mean = torch.empty(bucket.numel(), device=bucket.device)
    result = Mean(flat=mean, side=side)
    for part, used in zip(parts, had_gradients(settings, parts).tolist(), strict=True):
        gradient = unscaled(part, scale)
        result.used[part.name] = used
        if settings.observer is not None and not settings.observer.wants_mean:
            result.side[part.name] = settings.observer.observe(part.name, gradient).view(1, -1)
        rule = memory.Rule(weight_decay=part.residual.rule.weight_decay)
        mean[part.start : part.end] = memory.velocity(part.residual, memory.decayed(gradient, part.weight, rule))
    return result


def _compared(
    settings: Settings, own: Tensor, parts: list[Part], scale: float
) -> Generator[AllGather, Tensor, dict[str, Tensor]]:
    """(num_ranks, 1) for each part: every rank's comparison of its gradient, from `own`, with the mean in `parts`."""
    assert settings.observer is not None
    numbers = []
    for part in parts:
        mine = unscaled(replace(part, gradient=own[part.start : part.end]), scale)
        numbers.append(settings.observer.compare(part.name, mine, unscaled(part, scale)))
    rows = yield AllGather(torch.cat(numbers).view(torch.uint8))
    columns = rows.view(torch.float32).unbind(dim=1)
    return {part.name: column.view(-1, 1) for part, column in zip(parts, columns, strict=True)}


def _reduce_residual(settings: Settings, bucket: Tensor, parts: list[Part], scale: float) -> Exchange:
    num_ranks = settings.transport.num_ranks
    used = had_gradients(settings, parts).to(torch.float32)
    for part in parts:
        gradient = unscaled(part, scale)
        factor = memory.clip_factor(gradient, part.residual.rule, num_ranks)
        memory.accumulate(part.residual, memory.decayed(gradient, part.weight, part.residual.rule, factor))
    halves = [part.residual.next_v for part in parts] + [part.residual.next_u for part in parts]
    packed = torch.cat([*halves, used]).div_(num_ranks)
    reduced = yield AllReduce(packed)
    if not bool(torch.isfinite(reduced.sum())):
        return Mean(finite=False)
    pieces = reduced.split([*(half.numel() for half in halves), len(parts)])
    mean = torch.empty(bucket.numel(), device=bucket.device)
    result = Mean(flat=mean)
    for i, part in enumerate(parts):
        result.used[part.name] = bool(pieces[-1][i] > 0)
        mean[part.start : part.end] = pieces[i]
        part.residual.next_v.zero_()
        part.residual.next_u.copy_(pieces[len(parts) + i])
    return result
