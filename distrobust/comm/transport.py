"""Collectives as requests, and the process group that carries them and counts their bytes.

Counted per rank, as a ring carries them: an all_gather of s bytes from each of N ranks sends (N - 1) s from every
rank, an all_reduce of s bytes 2 s (N - 1) / N. With two ranks that is the message itself; packet headers come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from distrobust.errors import CommError

T = TypeVar("T")

# torch 2.13 renamed it and warns about the old name; older ones know no other
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class AllGather:
    """(s,), of equal length on all ranks -> (num_ranks, s), in rank order."""

    tensor: Tensor


@dataclass(frozen=True)
class AllReduce:
    """Any shape -> its sum over ranks, in place."""

    tensor: Tensor


@dataclass(frozen=True)
class AllToAll:
    """(num_ranks, s): row j is for rank j -> (num_ranks, s): row j is from rank j."""

    tensor: Tensor


@dataclass(frozen=True)
class ReduceScatter:
    """(num_ranks, s) -> (s,): the sum over ranks of this rank's row."""

    tensor: Tensor


Request = AllGather | AllReduce | AllToAll | ReduceScatter


@dataclass(frozen=True)
class Local:
    """A request to the ranks of this machine only."""

    request: Request


def request_bytes(request: Request, num_ranks: int) -> int:
    """What every rank sends for a request, in bytes."""
    size = request.tensor.numel() * request.tensor.element_size()
    if isinstance(request, AllGather):
        return (num_ranks - 1) * size
    if isinstance(request, AllReduce):
        return reduce_bytes(size, num_ranks)
    return size * (num_ranks - 1) // num_ranks


def reduce_bytes(num_bytes: int, num_ranks: int) -> int:
    """What every rank sends for a ring all_reduce of `num_bytes`."""
    return 2 * num_bytes * (num_ranks - 1) // num_ranks


class Transport:
    """A process group (None: the default one). Requests are issued at once and waited for through a future.

    `local`: the ranks of this machine, if `group` holds one rank of every machine; it counts its own bytes.
    `chains`: whether a request may be issued in the callback of another. Not with gloo: it hangs or crashes
    (torch 2.13).
    """

    chains = False

    def __init__(self, group: dist.ProcessGroup | None = None, local: Transport | None = None) -> None:
        self.group = group
        self.local = local
        self.rank: int = dist.get_rank() if group is None else group.rank()
        self.num_ranks: int = dist.get_world_size() if group is None else group.size()
        self.sent_bytes = 0

    def issue(self, request: Request | Local) -> Future[Any]:
        """The Future of what the request describes."""
        if isinstance(request, Local):
            assert self.local is not None
            return self.local.issue(request.request)
        self.sent_bytes += request_bytes(request, self.num_ranks)
        tensor = request.tensor.contiguous()
        group = self.group
        if isinstance(request, AllReduce):
            received = tensor
            work = dist.all_reduce(tensor, group=group, async_op=True)
        elif isinstance(request, AllGather):
            received = tensor.new_empty((self.num_ranks, tensor.numel()))
            work = _all_gather(received.view(-1), tensor.view(-1), group=group, async_op=True)
        else:  # also to reduce: gloo's own reduce_scatter has no future (torch 2.13); as many bytes, in rank order
            received = torch.empty_like(tensor)
            work = dist.all_to_all_single(received.view(-1), tensor.view(-1), group=group, async_op=True)

        def result(future: Future[Any]) -> Tensor:
            future.value()  # raises if a peer is gone; without it `received` would be read uninitialised
            return received.sum(dim=0) if isinstance(request, ReduceScatter) else received

        future: Future[Any] = work.get_future()
        return future.then(result)

    def once(self, received: Tensor, compute: Callable[[], T]) -> T:
        """A result that depends on `received` alone; ranks that share memory compute it once."""
        return compute()

    def reduce_bytes(self, num_bytes: int) -> int:
        """What every rank sends for a ring all_reduce of `num_bytes`."""
        return reduce_bytes(num_bytes, self.num_ranks)

    def gather_rows(self, row: Tensor) -> Tensor:
        """Waits for every rank's `row` (m,), any dtype of equal shape: (num_ranks, m). Raises CommError."""
        rows = self._wait(AllGather(row.contiguous().view(torch.uint8)))
        return rows.view(row.dtype)

    def sum_rows(self, tensor: Tensor) -> Tensor:
        """Waits for the sum of `tensor` over ranks, in place. Raises CommError."""
        return self._wait(AllReduce(tensor))

    def _wait(self, request: Request) -> Tensor:
        try:
            received: Tensor = self.issue(request).wait()
        except RuntimeError as error:
            raise CommError(self.explain(error)) from error
        return received

    def explain(self, error: Exception) -> str:
        """One line for a collective that failed."""
        return (
            f"rank {self.rank} of {self.num_ranks}: a collective failed, so another rank died or was too late "
            f"({' '.join(str(error).split())[:200]})"
        )
