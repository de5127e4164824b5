"""One bucket in a sparse phase: its gradients in, the identical mean on every rank out.

An exchange is a generator: it yields requests (transport.py) and is sent what came back; who carries them, a process
group or ranks inside one process, is not its business. Nothing is committed here: residuals only have their next
buffers written. Every rank adds the payloads in rank order, one scatter per rank, so the mean is the same on all of
them to the bit.

`all_gather`: every rank sends its k coordinates to all. One hop; N - 1 messages a rank.

`sharded`: rank r owns the r-th part of the line. Every rank selects k / N coordinates in each part and sends them to
the owner, who adds them to its own residual there, uncompressed, and sends k / N coordinates of the sum to all; the
rest stays in that residual, N-fold since it stands for a mean. About 2 k coordinates a rank, whatever N is. After
Ok-Topk (Li and Hoefler, PPoPP 2022) and DoubleSqueeze (Tang et al., ICML 2019): error feedback on both hops.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distrobust.comm import line
from distrobust.comm.bucket import Bucket, Exchange, Mean, Settings, Step, Verdict
from distrobust.comm.line import Cut
from distrobust.comm.local import LocalHalf, select_in
from distrobust.comm.transport import AllGather, AllToAll
from distrobust.compression import codec, message
from distrobust.compression.message import Layout, Message
from distrobust.errors import CodecError


def all_gather(settings: Settings, step: Step, bucket: Bucket, verdict: Verdict) -> Exchange:
    """One hop: every rank's payload to every rank."""
    transport = settings.transport
    local = LocalHalf(settings, step, bucket, verdict, 1, owned=None)
    received = yield AllGather(local.messages[0])

    def compute() -> Mean:
        layout, known = local.layouts[0], local.decoded.get(0)
        decoded = [
            _unpack(layout, received[rank], rank, bucket, known if rank == transport.rank else None)
            for rank in range(transport.num_ranks)
        ]
        mean = local.headers(decoded)
        if mean.finite:
            _share_out(mean, bucket, [(m.indices, m.values / transport.num_ranks) for m in decoded], local.size)
        return mean

    return transport.once(received, compute)


def sharded(settings: Settings, step: Step, bucket: Bucket, verdict: Verdict) -> Exchange:
    """Two hops: each part's payloads to its owner, then the owner's payload to all."""
    transport = settings.transport
    num_ranks, rank = transport.num_ranks, transport.rank
    local = LocalHalf(settings, step, bucket, verdict, num_ranks, owned=rank)
    longest = max(local.layout(cut.space.k, owner).num_bytes for owner, cut in enumerate(local.cuts))
    received = yield AllToAll(_rows(local.messages, longest))
    own = local.cuts[rank]
    damaged: CodecError | None = None
    mean = Mean(finite=False)
    try:
        decoded = []
        for sender in range(num_ranks):
            layout = local.layout(0 if sender == rank else own.space.k, rank)
            decoded.append(_unpack(layout, received[sender, : layout.num_bytes], sender, bucket))
        mean = local.headers(decoded)
    except CodecError as error:
        damaged = error
    layouts = [local.layout(cut.space.k, owner, hop=1) for owner, cut in enumerate(local.cuts)]
    if damaged is not None:
        reply = message.pack_status(layouts[rank], message.DAMAGED, received.device)
    elif not mean.finite:
        reply = message.pack_status(layouts[rank], message.NON_FINITE, received.device)
    else:
        for one in decoded:
            if one.indices.numel():
                line.add(own, one.indices, one.values)
        payload = _encode_owned(settings, own, num_ranks) if own.pieces else None
        nothing = received.new_zeros(0)
        reply = message.pack(layouts[rank], message.header(nothing.bool(), nothing.float()), payload)
    received = yield AllGather(_rows([reply], max(layout.num_bytes for layout in layouts))[0])
    if damaged is not None:
        raise damaged

    def compute() -> list[tuple[Tensor, Tensor]]:
        replies = [
            _unpack(layout, received[owner, : layout.num_bytes], owner, bucket) for owner, layout in enumerate(layouts)
        ]
        return [(m.indices + cut.start, m.values) for m, cut in zip(replies, local.cuts, strict=True)]

    payloads = transport.once(received, compute)
    if mean.finite:
        _share_out(mean, bucket, payloads, local.size)
    return mean


def _encode_owned(settings: Settings, own: Cut, num_ranks: int) -> Tensor:
    """The second hop: the largest of the sums in this rank's own part, as means; what is not sent stays, as sums."""
    places, sums = line.join(own, [select_in(settings, unit, piece) for unit, piece in own.pieces])
    payload, places, sent = codec.encode(places, sums / num_ranks, own.space, settings.code)
    line.remove_sent(own, places, sent * num_ranks)
    return payload


def _share_out(mean: Mean, bucket: Bucket, payloads: list[tuple[Tensor, Tensor]], size: int) -> None:
    """Divides places on the line into those of the bucket and those of the small parameters behind it."""
    n = bucket.flat.numel()
    if size == n:
        mean.payloads = payloads
        return
    mean.fused = torch.zeros(size - n, device=bucket.flat.device)
    for places, values in payloads:
        inside = int(torch.searchsorted(places, n))
        mean.payloads.append((places[:inside], values[:inside]))
        mean.fused.index_add_(0, places[inside:] - n, values[inside:])


def _rows(messages: list[Tensor], length: int) -> Tensor:
    """(len(messages), length): padded with zeros to one length."""
    rows = messages[0].new_zeros((len(messages), length))
    for row, one in zip(rows, messages, strict=True):
        row[: one.numel()] = one
    return rows


def _unpack(layout: Layout, received: Tensor, rank: int, bucket: Bucket, known: Message | None = None) -> Message:
    """`known`: what is in it if it arrives as it left."""
    names = f"{bucket.parts[0].name} .. {bucket.parts[-1].name}"
    where = f"step {layout.step}, message of rank {rank} for {names}"
    try:
        if known is not None:
            message.check(layout, received)
            return known
        decoded = message.unpack(layout, received)
    except CodecError as error:
        raise CodecError(f"{where}: {error}; nothing was applied") from None
    if decoded.status == message.DAMAGED:
        raise CodecError(f"{where}: that rank could not read what it was sent; nothing was applied")
    return decoded


# and in how many hops
EXCHANGES: dict[str, tuple[Callable[[Settings, Step, Bucket, Verdict], Exchange], int]] = {
    "all_gather": (all_gather, 1),
    "sharded": (sharded, 2),
}
