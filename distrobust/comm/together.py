"""N ranks in one process, on one thread: the same exchanges without a process group.

Every rank's requests are kept until the last rank has made its own; then all futures are completed, so N ranks cost
no more than their computing. For simulations with many workers, and for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.futures import Future

from distrobust.comm.transport import AllGather, AllReduce, AllToAll, Local, Request, Transport, request_bytes

T = TypeVar("T")


class _Meeting:
    """What the ranks share: requests that some rank has not made yet, oldest first."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.open: list[dict[int, tuple[Request, Future[Any]]]] = []
        self.computed: tuple[Tensor, Any] | None = None

    def join(self, rank: int, request: Request) -> Future[Any]:
        future: Future[Any] = Future()
        for requests in self.open:
            if rank not in requests:
                requests[rank] = (request, future)
                break
        else:
            self.open.append({rank: (request, future)})
        if self.open and len(self.open[0]) == self.num_ranks:
            complete = self.open.pop(0)
            ordered = [complete[r] for r in range(self.num_ranks)]
            for (_, waiting), result in zip(ordered, _results([r for r, _ in ordered]), strict=True):
                waiting.set_result(result)
        return future


def _results(requests: list[Request]) -> list[Tensor]:
    """What each rank receives; ranks share the tensor where all receive the same."""
    first = requests[0]
    tensors = [request.tensor for request in requests]
    if isinstance(first, AllGather):
        return [torch.stack([t.view(-1) for t in tensors])] * len(tensors)
    if isinstance(first, AllReduce):
        total = torch.stack(tensors).sum(dim=0)
        return [t.copy_(total) for t in tensors]
    if isinstance(first, AllToAll):
        return list(torch.stack(tensors, dim=1))
    return list(torch.stack(tensors).sum(dim=0))


class InProcess(Transport):
    """The transport of one of `num_ranks` ranks; make all of them with `in_process`."""

    chains = True

    def __init__(self, rank: int, meeting: _Meeting, local: InProcess | None = None) -> None:
        self.group = None
        self.local = local
        self.rank = rank
        self.num_ranks = meeting.num_ranks
        self.sent_bytes = 0
        self._meeting = meeting

    def issue(self, request: Request | Local) -> Future[Any]:
        if isinstance(request, Local):
            assert self.local is not None
            return self.local.issue(request.request)
        self.sent_bytes += request_bytes(request, self.num_ranks)
        return self._meeting.join(self.rank, request)

    def once(self, received: Tensor, compute: Callable[[], T]) -> T:
        known = self._meeting.computed
        if known is None or known[0] is not received:
            known = self._meeting.computed = (received, compute())
        result: T = known[1]
        return result


def in_process(num_ranks: int, num_local: int = 1) -> list[InProcess]:
    """One transport for each rank. Ranks take turns: each makes its next request before any waits for one.

    `num_local` above 1: `num_ranks` machines of that many ranks each, machine by machine, with a `local` transport.
    """
    across = [_Meeting(num_ranks) for _ in range(num_local)]
    if num_local == 1:
        return [InProcess(rank, across[0]) for rank in range(num_ranks)]
    within = [_Meeting(num_local) for _ in range(num_ranks)]
    return [
        InProcess(machine, across[i], InProcess(i, within[machine]))
        for machine in range(num_ranks)
        for i in range(num_local)
    ]
