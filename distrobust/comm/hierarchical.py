"""Two levels: dense inside a machine, where the link is fast, any other exchange between machines.

Local rank l of L owns the l-th of L equal pieces of every parameter, of its gradient and of its residual. A
reduce_scatter inside the machine gives it the machine's mean gradient there; it exchanges that piece with the ranks of
the same local index on the other machines; an all_gather inside the machine puts the pieces together. So the machines
are the workers of the compression, residuals take L times less memory, and L network cards are busy.

Pieces belong to parameters, not to buckets, so that residuals survive DDP's rebuilding of its buckets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distrobust.comm.bucket import Bucket, Exchange, Mean, Settings, Step, Verdict
from distrobust.comm.line import Part
from distrobust.comm.transport import AllGather, Local, ReduceScatter
from distrobust.compression import message
from distrobust.errors import CodecError


def piece_size(n: int, num_local: int) -> int:
    """Elements of a parameter of n that each local rank owns; the last pieces are padded with zeros."""
    return -(-n // num_local)


def hierarchical(
    inner: Callable[[Settings, Step, Bucket, Verdict], Exchange],
    settings: Settings,
    step: Step,
    bucket: Bucket,
    verdict: Verdict,
) -> Exchange:
    """`inner` between machines, on the pieces this rank owns. Two hops more than `inner`."""
    local = settings.transport.local
    assert local is not None
    num_local, rank = local.num_ranks, local.rank
    sizes = [piece_size(part.gradient.numel(), num_local) for part in bucket.parts]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rows = bucket.flat.new_zeros((num_local, sum(sizes)))
    for part, start, size in zip(bucket.parts, starts, sizes, strict=True):
        _into_rows(part.gradient, rows[:, start : start + size])
    owned = yield Local(ReduceScatter(rows))
    owned = owned.to(torch.float32) / num_local

    pieces = []
    for part, start, size in zip(bucket.parts, starts, sizes, strict=True):
        weight = part.weight[rank * size : (rank + 1) * size]
        weight = torch.nn.functional.pad(weight, (0, size - weight.numel()))
        pieces.append(Part(part.name, start, owned[start : start + size], weight, part.residual))
    damaged: CodecError | None = None
    try:
        mean = yield from inner(settings, step, Bucket(owned, pieces, bucket.is_last), verdict)
    except CodecError as error:
        damaged, mean = error, Mean(finite=False)
    answer = owned.new_zeros(owned.numel())
    fused = owned.new_zeros(sum(r.v.numel() for r in step.fused.values()) if bucket.is_last else 0)
    if mean.finite:
        mean.write(answer, 1.0)
        if mean.fused is not None:
            fused = mean.fused
    flags = owned.new_tensor([float(mean.used.get(part.name, False)) for part in bucket.parts])
    status = message.DAMAGED if damaged is not None else 0 if mean.finite else message.NON_FINITE
    gathered = yield Local(AllGather(torch.cat([owned.new_tensor([float(status)]), flags, answer, fused])))
    if damaged is not None:
        raise damaged
    statuses = gathered[:, 0].tolist()
    if message.DAMAGED in statuses:
        raise CodecError(
            f"step {step.number}, local rank {statuses.index(message.DAMAGED)} of this machine for "
            f"{bucket.parts[0].name} .. {bucket.parts[-1].name}: it could not read its messages; nothing was applied"
        )
    if any(statuses):
        return Mean(finite=False)
    return _together(mean, bucket, step, gathered[:, 1:], starts, sizes)


def _into_rows(values: Tensor, rows: Tensor) -> None:
    """(n,) into the (num_local, size) of its pieces."""
    num_local, size = rows.shape
    whole = values.numel() // size
    rows[:whole] = values[: whole * size].view(whole, size)
    if whole < num_local:
        rest = values[whole * size :]
        rows[whole, : rest.numel()] = rest


def _together(mean: Mean, bucket: Bucket, step: Step, rows: Tensor, starts: list[int], sizes: list[int]) -> Mean:
    """The bucket's mean from the local ranks' (flags | pieces | fused pieces)."""
    num_flags = len(bucket.parts)
    used = (rows[:, :num_flags] > 0).any(dim=0).tolist()
    flat = rows.new_zeros(bucket.flat.numel())
    for part, start, size in zip(bucket.parts, starts, sizes, strict=True):
        start += num_flags
        flat[part.start : part.end] = rows[:, start : start + size].reshape(-1)[: part.gradient.numel()]
    fused = None
    if bucket.is_last and step.fused:
        at = num_flags + sum(sizes)
        joined = []
        for name, residual in step.fused.items():
            size = residual.v.numel()
            joined.append(rows[:, at : at + size].reshape(-1)[: step.num_fused[name]])
            at += size
        fused = torch.cat(joined)
    return Mean(flat=flat, fused=fused, used={p.name: u for p, u in zip(bucket.parts, used, strict=True)})
