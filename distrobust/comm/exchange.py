"""One bucket in a sparse phase: its gradients in, the identical mean on every rank out.

`launch_sparse` does the local half and issues the one collective; the Future it returns holds the `Mean`, decoded in
its callback. Nothing is committed here: residuals only have their next buffers written. Every rank adds the payloads in
rank order, one scatter per rank, so the mean is the same on all of them to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

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


class Observer(Protocol):
    """Looks at every gradient before it is compressed; one number a parameter travels in the message."""

    def observe(self, name: str, gradient: Tensor) -> Tensor:
        """One float32 value for a gradient (n,), local in a sparse phase, the mean over ranks in a dense one."""
        ...

    def commit(self) -> None:
        """The step of the gradients observed last was taken."""
        ...


@dataclass(frozen=True)
class Settings:
    """What stays the same from bucket to bucket."""

    transport: Transport
    code: ValueCode
    select: Selector
    detect_unused: bool
    observer: Observer | None


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
        gradient = unscaled(part, step.scale)
        local = memory.local_gradient(gradient, part.weight, part.residual.rule, settings.transport.num_ranks)
        memory.accumulate(part.residual, local)
        total += part.residual.next_v.sum()
        used.append(had_gradient(settings, gradient))
        if settings.observer is not None:
            side.append(settings.observer.observe(part.name, gradient))
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
            return _decode(layout, received, parts, bucket.numel(), bool(large))
        except CodecError as error:
            return Mean(None, damaged=error)  # as a value: an exception here would reach the caller as text only

    return settings.transport.all_gather(packed).then(decode), finite


def unscaled(part: Part, scale: float) -> Tensor:
    """The part's gradient without the loss scale."""
    return part.gradient.to(torch.float32) / scale if scale != 1.0 else part.gradient


def had_gradient(settings: Settings, gradient: Tensor) -> Tensor:
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
    ends = torch.tensor([r.v.numel() for r in residuals], device=indices.device).cumsum(0)
    counts = torch.searchsorted(indices, ends).diff(prepend=ends.new_zeros(1)).tolist()
    starts = (ends - ends.diff(prepend=ends.new_zeros(1))).tolist()
    for residual, start, s, piece in zip(residuals, starts, indices.split(counts), sent.split(counts), strict=True):
        memory.remove_sent(residual, s - start, piece)
    return payload


def _decode(layout: Layout, messages: Tensor, parts: list[Part], size: int, large: bool) -> Mean:
    """The mean over `messages` (num_ranks, bytes) of a bucket of `size`; `large`: the first section is the bucket's."""
    decoded = []
    for rank, received in enumerate(messages):
        try:
            decoded.append(message.unpack(layout, received))
        except CodecError as error:
            names = f"{parts[0].name} .. {parts[-1].name}"
            raise CodecError(
                f"step {layout.step}, message of rank {rank} for {names}: {error}; nothing was applied"
            ) from None
    finite = [one for one in decoded if one is not None]
    if len(finite) < len(messages):
        return Mean(None)
    means = [torch.zeros(section.n, device=messages.device) for section in layout.sections]
    for one in finite:
        for mean, (indices, values) in zip(means, one.payloads, strict=True):
            mean.index_add_(0, indices, values)
    for mean in means:
        mean /= len(messages)
    names_in_order = [part.name for part in parts]
    used = torch.stack([one.used for one in finite]).any(dim=0).tolist()
    side = (torch.stack([one.side for one in finite]).sum(dim=0) / len(messages)).tolist()
    return Mean(
        flat=means[0] if large else torch.zeros(size, device=messages.device),
        fused=means[-1] if len(means) > int(large) else None,
        used=dict(zip(names_in_order, used, strict=True)),
        side=dict(zip(names_in_order, side, strict=False)),
        side_is_local=True,
    )
