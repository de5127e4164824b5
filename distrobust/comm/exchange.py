"""One bucket: its gradients in, the identical mean on every rank out.

`launch_sparse` and `launch_dense` do the local half and issue the one collective; the Future they return holds the
`Mean`, decoded in its callback. Nothing is committed here: residuals only have their next buffers written.
Every rank adds the payloads in rank order, one scatter per rank, so the mean is the same on all of them to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from distrobust.comm.transport import Transport
from distrobust.compression import codec, memory, message
from distrobust.compression.codec import ValueCode
from distrobust.compression.memory import Residual
from distrobust.compression.message import Layout, Section
from distrobust.compression.select import Selector, num_selected
from distrobust.errors import CodecError


@dataclass(frozen=True)
class Part:
    """One parameter within a bucket: `gradient` and `weight` (n,) are flat, in the order of the parameter's storage."""

    name: str
    start: int  # first coordinate in the bucket
    gradient: Tensor
    weight: Tensor
    residual: Residual

    @property
    def end(self) -> int:
        return self.start + self.gradient.numel()


@dataclass
class Mean:
    """What the ranks agreed on for one bucket. `flat` is None when some rank's gradient was not finite."""

    flat: Tensor | None  # (bucket,) float32
    fused: Tensor | None = None  # (sum of all fused parameters,) float32, in the last bucket only
    used: dict[str, bool] = field(default_factory=dict)  # whether any rank had a gradient
    side: dict[str, float] = field(default_factory=dict)  # mean over ranks of the observed values
    side_is_local: bool = False  # observed on local gradients, not on their mean
    damaged: CodecError | None = None  # a callback that raised it would leave its text alone


Observe = Callable[[str, Tensor], Tensor]  # (name, gradient (n,)) -> one float32 value


@dataclass(frozen=True)
class Settings:
    """What stays the same from bucket to bucket."""

    transport: Transport
    code: ValueCode
    select: Selector
    detect_unused: bool
    observe: Observe | None


@dataclass(frozen=True)
class Step:
    """What the buckets of one backward pass share."""

    number: int
    density: float
    scale: float  # loss scale of the gradients, 1.0 without a GradScaler
    fused: dict[str, Residual]  # small parameters, in the model's order, selected together


def launch_sparse(
    settings: Settings, step: Step, bucket: Tensor, parts: list[Part], is_last: bool, finite: bool
) -> tuple[Future[Any], bool]:
    """Sends the largest coordinates of every large part and, in the last bucket, of all small ones together.

    By the last bucket every small parameter of the model has been accumulated, wherever DDP put it, so the choice does
    not depend on how parameters fall into buckets. `finite`: this rank's earlier buckets were.
    Returns the Future of a Mean, and whether this rank's values are finite up to here.
    """
    device = bucket.device
    used, side = [], []
    total = torch.zeros((), device=device)
    for part in parts:
        gradient = _unscaled(part, step.scale)
        local = memory.local_gradient(gradient, part.weight, part.residual.rule, settings.transport.num_ranks)
        memory.accumulate(part.residual, local)
        total += part.residual.next_v.sum()
        used.append(_any(settings, gradient))
        if settings.observe is not None:
            side.append(settings.observe(part.name, gradient))
    finite = finite and bool(torch.isfinite(total))

    large = [part for part in parts if part.name not in step.fused]
    counts = [num_selected(part.gradient.numel(), step.density) for part in large]
    sections = [Section(bucket.numel(), sum(counts))] if large else []
    fused = list(step.fused.values()) if is_last else []
    if fused:
        size = sum(residual.v.numel() for residual in fused)
        sections.append(Section(size, num_selected(size, step.density)))
    layout = Layout(tuple(sections), settings.code, len(parts), len(side), step.number)

    if finite:
        payloads = []
        if large:
            payloads.append(_encode(settings, large, counts, bucket.numel()))
        if fused:
            payloads.append(_encode_fused(settings, fused, sections[-1]))
        sides = torch.stack(side) if side else torch.zeros(0, device=device)
        packed = message.pack(layout, torch.stack(used), sides, payloads)
    else:
        packed = message.pack_non_finite(layout, device)

    def decode(future: Future[Any]) -> Mean:
        received = future.value()
        try:
            means = _decode(layout, received, parts)
        except CodecError as error:
            return Mean(None, damaged=error)
        if means is None:
            return Mean(None)
        mean, sums = means
        mean.flat = sums[0] if large else torch.zeros_like(bucket, dtype=torch.float32)
        mean.fused = sums[-1] if fused else None
        return mean

    return settings.transport.all_gather(packed).then(decode), finite


def _unscaled(part: Part, scale: float) -> Tensor:
    return part.gradient.to(torch.float32) / scale if scale != 1.0 else part.gradient


def _any(settings: Settings, gradient: Tensor) -> Tensor:
    """Whether this rank had a gradient; DDP leaves zeros in the bucket for a parameter that was not used."""
    if settings.detect_unused:
        return (gradient != 0).any()
    return torch.ones((), dtype=torch.bool, device=gradient.device)


def _encode(settings: Settings, parts: list[Part], counts: list[int], n: int) -> Tensor:
    """Selects in each part by itself, codes all in the bucket's index space, removes what receivers will decode."""
    residuals = [part.residual for part in parts]
    chosen = [settings.select(r.next_v, k) for r, k in zip(residuals, counts, strict=True)]
    values = torch.cat([r.next_v[s] for r, s in zip(residuals, chosen, strict=True)])
    indices = torch.cat([s + part.start for s, part in zip(chosen, parts, strict=True)])
    payload, sent = codec.encode(indices, values, n, settings.code)
    for residual, s, piece in zip(residuals, chosen, sent.split(counts), strict=True):
        memory.remove_sent(residual, s, piece)
    return payload


def _encode_fused(settings: Settings, residuals: list[Residual], section: Section) -> Tensor:
    """Selects across all residuals at once: small tensors compete with each other instead of each sending a minimum."""
    joined = torch.cat([r.next_v for r in residuals])
    indices = settings.select(joined, section.k)
    payload, sent = codec.encode(indices, joined[indices], section.n, settings.code)
    start = 0
    for residual in residuals:
        end = start + residual.v.numel()
        first, last = torch.searchsorted(indices, torch.tensor([start, end], device=indices.device)).tolist()
        memory.remove_sent(residual, indices[first:last] - start, sent[first:last])
        start = end
    return payload


def _decode(layout: Layout, messages: Tensor, parts: list[Part]) -> tuple[Mean, list[Tensor]] | None:
    """The mean of each section over `messages` (num_ranks, bytes); None if some rank was not finite."""
    num_ranks = messages.shape[0]
    decoded = []
    for rank in range(num_ranks):
        try:
            decoded.append(message.unpack(layout, messages[rank]))
        except CodecError as error:
            names = f"{parts[0].name} .. {parts[-1].name}"
            raise CodecError(
                f"step {layout.step}, message of rank {rank} for {names}: {error}; nothing was applied"
            ) from None
    finite = [one for one in decoded if one is not None]
    if len(finite) < num_ranks:
        return None
    sums = [torch.zeros(section.n, device=messages.device) for section in layout.sections]
    for one in finite:
        for total, (indices, values) in zip(sums, one.payloads, strict=True):
            total.index_add_(0, indices, values)
    for total in sums:
        total /= num_ranks
    order = [part.name for part in parts]
    used = torch.stack([one.used for one in finite]).any(dim=0).tolist()
    side = (torch.stack([one.side for one in finite]).sum(dim=0) / num_ranks).tolist()
    mean = Mean(None, used=dict(zip(order, used, strict=True)), side=dict(zip(order, side, strict=False)))
    mean.side_is_local = True
    return mean, sums


def launch_dense(settings: Settings, step: Step, bucket: Tensor, parts: list[Part]) -> Future[Any]:
    """All-reduces the bucket and applies the momentum here: DistributedDataParallel with torch.optim.SGD.

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
        result = Mean(torch.empty(bucket.numel(), device=bucket.device))
        assert result.flat is not None
        for part in parts:
            gradient = _unscaled(part, scale)
            result.used[part.name] = bool(_any(settings, gradient))
            if settings.observe is not None:
                result.side[part.name] = float(settings.observe(part.name, gradient))
            decay = memory.Rule(weight_decay=part.residual.rule.weight_decay)
            decayed = memory.local_gradient(gradient, part.weight, decay, 1)
            result.flat[part.start : part.end] = memory.velocity(part.residual, decayed)
            part.residual.next_v.zero_()
        return result

    return transport.all_reduce(bucket).then(finish)


def _reduce_residual(settings: Settings, bucket: Tensor, parts: list[Part], scale: float) -> Future[Any]:
    transport = settings.transport
    used = torch.ones(len(parts), device=bucket.device)
    for i, part in enumerate(parts):
        gradient = _unscaled(part, scale)
        used[i] = _any(settings, gradient)
        local = memory.local_gradient(gradient, part.weight, part.residual.rule, transport.num_ranks)
        memory.accumulate(part.residual, local)
    halves = [part.residual.next_v for part in parts] + [part.residual.next_u for part in parts]
    packed = torch.cat([*halves, used]).div_(transport.num_ranks)

    def finish(future: Future[Any]) -> Mean:
        reduced = future.value()
        if not bool(torch.isfinite(reduced.sum())):
            return Mean(None)
        pieces = reduced.split([*(half.numel() for half in halves), len(parts)])
        result = Mean(torch.empty(bucket.numel(), device=bucket.device))
        assert result.flat is not None
        for i, part in enumerate(parts):
            result.used[part.name] = bool(pieces[-1][i] > 0)
            result.flat[part.start : part.end] = pieces[i]
            part.residual.next_v.zero_()
            part.residual.next_u.copy_(pieces[len(parts) + i])
        return result

    return transport.all_reduce(packed).then(finish)
