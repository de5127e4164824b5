"""Clean and robust accuracy of the model in training, shared out over the ranks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.comm.transport import Transport
from distrobust.data import Shard
from distrobust.evaluation.accuracy import Counts, Score, score
from distrobust.evaluation.counting import count_correct

NATURAL = Attack("none")


def averaged(net: nn.Module, transport: Transport) -> nn.Module:
    """A contiguous copy of `net` in evaluation mode, with batch-norm statistics averaged over ranks.

    Ranks see different images, so their statistics differ; the copy is the same on all of them.
    """
    result = to_memory_format(copy.deepcopy(net), torch.contiguous_format)
    result.zero_grad(set_to_none=True)
    buffers = [buffer for buffer in result.buffers() if buffer.is_floating_point()]
    if buffers and transport.num_ranks > 1:
        joined = torch.cat([buffer.reshape(-1).float() for buffer in buffers])
        mean = transport.sum_rows(joined) / transport.num_ranks
        for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
    result.eval()
    return result


def to_memory_format(net: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """`net`, its 4-d tensors laid out anew (torch's annotations of Module.to know no memory format)."""
    net.to(memory_format=memory_format)  # type: ignore[call-overload]
    return net


def distributed_score(
    net: nn.Module,
    shard: Shard,
    attack: Attack,
    threat: Threat | None,
    *,
    limit: int,
    batch_size: int,
    seed: int,
    transport: Transport,
    beat: Callable[[], None] = lambda: None,
) -> Score:
    """Score over `limit` rows (0: all) of all ranks' shards, the same rows whatever the number of ranks.

    beat: called with every batch of this rank.
    """
    indices = itertools.count(transport.rank, transport.num_ranks)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in spaced_rows(shard, limit, batch_size):
            yield batch
            beat()

    counts = count_correct(net, batches(), attack, threat, seed, indices=indices)
    num_classes = shard.source.num_classes
    device = next(net.parameters()).device
    rows = transport.gather_rows(counts.pack(num_classes).to(device))
    return score(Counts.unpack(rows.sum(dim=0).cpu()), attack, threat, seed)


def spaced_rows(shard: Shard, limit: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of `limit` rows spread evenly over all ranks' rows (0: all), in order.

    Evenly, so that every rank has as many, and a file sorted by class gives as many of each.
    """
    if not 0 < limit < shard.total_rows:
        yield from shard.in_order(batch_size)
        return
    chosen = shard.selected[np.linspace(0, shard.total_rows - 1, limit).round().astype(np.int64)]
    wanted = torch.from_numpy(np.isin(shard.rows, chosen))
    start = 0
    kept: list[tuple[Tensor, Tensor]] = []
    for images, labels in shard.in_order(batch_size):
        mask = wanted[start : start + len(labels)]
        start += len(labels)
        kept.append((images[mask], labels[mask]))
        num_kept = sum(len(part) for _, part in kept)
        if num_kept >= batch_size or (num_kept and start == len(wanted)):
            yield torch.cat([part for part, _ in kept]), torch.cat([part for _, part in kept])
            kept = []
