"""Clean and robust accuracy of the model in training, shared out over the ranks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distrobust.adversarial.accuracy import Counts, Score, score
from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.evaluate import count_correct
from distrobust.adversarial.threat import Threat
from distrobust.comm.transport import Transport
from distrobust.data import Shard

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
        mean = transport.all_reduce(joined).wait() / transport.num_ranks
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
) -> Score:
    """Score over the first `limit` rows of all ranks' shards (0: all), the same rows whatever the number of ranks."""
    indices = itertools.count(transport.rank, transport.num_ranks)
    counts = count_correct(net, first_rows(shard, limit, batch_size), attack, threat, seed, indices=indices)
    num_classes = shard.source.num_classes
    device = next(net.parameters()).device
    # float32 on the way: counts are exact up to 2^24 images
    rows = transport.gather_rows(counts.pack(num_classes).to(device, torch.float32))
    return score(Counts.unpack(rows.double().sum(dim=0).cpu()), attack, threat, seed)


def first_rows(shard: Shard, limit: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the `limit` lowest rows, in order."""
    left = len(shard.rows)
    if 0 < limit < shard.total_rows:
        bound = shard.selected[limit - 1]
        left = int((shard.rows <= bound).sum())
    for images, labels in shard.in_order(batch_size):
        if left <= 0:
            return
        yield images[:left], labels[:left]
        left -= len(labels)
