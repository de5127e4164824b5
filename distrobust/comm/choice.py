"""Which exchange: by the bytes each would send over the slow link, and the reason in words.

Per worker and step, with a message of m bytes (k coordinates), N workers, L of them on each machine, n parameters:

    dense ring             8 n (N - 1) / N
    all_gather             (N - 1) m
    sharded                2 m (N - 1) / N
    hierarchical           the same with N / L machines as the workers, and a machine sends what one worker did

Sharded selects twice, so it is taken only where it sends less than half of what an all_gather does. Two levels need the
same number of workers on every machine, ranks numbered machine by machine: every rank tells the others what its
launcher says (LOCAL_WORLD_SIZE, LOCAL_RANK), so that all of them choose the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distrobust.comm.transport import Transport
from distrobust.errors import ConfigError

NAMES = ("auto", "all_gather", "sharded", "hierarchical")
SHARDED_FROM = 5  # workers: 2 (N - 1) / N is less than half of N - 1


@dataclass(frozen=True)
class Choice:
    """`exchange` between workers, or between machines if `transport.local` is set."""

    exchange: str
    transport: Transport
    reason: str


def choose(
    wanted: str,
    group: dist.ProcessGroup | None,
    transport: Transport | None,
    needs: str,
    device: torch.device | None = None,
) -> Choice:
    """Makes the transport for `wanted`, one of NAMES. Every rank calls it; ConfigError where it cannot be had.

    needs: what else wants something of the exchange: "step-ahead", "noise", "clip", "dense" where nothing will be
    compressed, or "". device: where the group's collectives can work.
    """
    flat = transport or Transport(group)
    if flat.local is not None:  # made by the caller, with its levels
        inner = flat_exchange(flat.num_ranks) if wanted in ("auto", "hierarchical") else wanted
        return Choice(inner, flat, "the transport has two levels")
    if wanted in ("all_gather", "sharded"):
        return Choice(wanted, flat, "as configured")
    if wanted == "auto" and needs == "step-ahead":
        return Choice("all_gather", flat, "step-ahead needs every worker's residual to be its own")
    may_have_levels = flat.group is None and dist.is_initialized()
    if wanted == "hierarchical" or (may_have_levels and needs == ""):
        num_local = machine_size(_launched(flat, device)) if may_have_levels else 1
        if num_local > 1:
            machines = flat.num_ranks // num_local
            reason = f"{num_local} workers on each of {machines} machines: dense inside, compressed between them"
            return Choice(flat_exchange(machines), _two_levels(flat, num_local), reason)
    if wanted == "hierarchical":
        raise ConfigError(
            "compress.exchange: hierarchical needs the default process group and several machines with the same number "
            f"of workers, more than one, on each, ranks numbered machine by machine; got {flat.num_ranks} workers, "
            f"{os.environ.get('LOCAL_WORLD_SIZE', 'an unknown number of them')} on this machine (LOCAL_WORLD_SIZE)"
        )
    exchange = flat_exchange(flat.num_ranks)
    times = (flat.num_ranks - 1, 2 * (flat.num_ranks - 1) / flat.num_ranks)
    reason = f"{flat.num_ranks} workers: all_gather sends {times[0]} messages a worker, sharded {times[1]:.1f}"
    return Choice(exchange, flat, reason)


def flat_exchange(num_ranks: int) -> str:
    """Between that many workers of equal standing."""
    return "sharded" if num_ranks >= SHARDED_FROM else "all_gather"


def _launched(flat: Transport, device: torch.device | None) -> Tensor:
    """(num_ranks, 2) int64: every rank's LOCAL_WORLD_SIZE (1 where unknown) and LOCAL_RANK. Not counted."""
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = torch.tensor([num_local, int(os.environ.get("LOCAL_RANK", flat.rank % num_local))])
    before = flat.sent_bytes
    rows = flat.gather_rows(own.to(device)).cpu()
    flat.sent_bytes = before
    return rows


def machine_size(launched: Tensor) -> int:
    """(num_ranks, 2): LOCAL_WORLD_SIZE and LOCAL_RANK -> workers on each of several like machines; 1: no such."""
    num_ranks, num_local = len(launched), int(launched[0, 0])
    expected = torch.tensor([[num_local, rank % num_local] for rank in range(num_ranks)])
    regular = num_local < num_ranks and num_ranks % num_local == 0 and torch.equal(launched, expected)
    return num_local if regular else 1


def _two_levels(flat: Transport, num_local: int) -> Transport:
    """A group for the ranks of each machine, one for those of equal local index; ranks are numbered by machine."""
    everyone = list(range(flat.num_ranks))
    machines = [everyone[start : start + num_local] for start in range(0, flat.num_ranks, num_local)]
    local_group = across_group = None
    for ranks in machines:
        made = dist.new_group(ranks)
        local_group = made if flat.rank in ranks else local_group
    for local_rank in range(num_local):
        ranks = everyone[local_rank::num_local]
        made = dist.new_group(ranks)
        across_group = made if flat.rank in ranks else across_group
    return Transport(across_group, local=Transport(local_group))
