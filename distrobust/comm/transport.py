"""A process group that counts the bytes it is handed.

Counted per rank, as a ring carries them: an all_gather of s bytes from each of N ranks sends (N - 1) s from every
rank, an all_reduce of s bytes 2 s (N - 1) / N. With two ranks that is the message itself; packet headers come on top.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from distrobust.errors import CommError

# torch 2.13 renamed it and warns about the old name; older ones know no other
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Transport:
    """Collectives over `group` (None: the default group), issued at once and waited for through a future."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank: int = dist.get_rank() if group is None else group.rank()
        self.num_ranks: int = dist.get_world_size() if group is None else group.size()
        self.sent_bytes = 0

    def all_gather(self, message: Tensor) -> Future[Any]:
        """`message` (s,) uint8, of equal length on all ranks; the value is (num_ranks, s), in rank order."""
        self.sent_bytes += (self.num_ranks - 1) * message.numel() * message.element_size()
        received = message.new_empty((self.num_ranks, message.numel()))
        work = _all_gather(received.view(-1), message, group=self.group, async_op=True)

        def result(future: Future[Any]) -> Tensor:
            future.value()  # raises if a peer is gone; without it `received` would be read uninitialised
            return received

        future: Future[Any] = work.get_future()
        return future.then(result)

    def all_reduce(self, tensor: Tensor) -> Future[Any]:
        """Sums `tensor` over ranks in place; the value is `tensor`."""
        self.sent_bytes += self.reduce_bytes(tensor.numel() * tensor.element_size())
        work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def result(future: Future[Any]) -> Tensor:
            future.value()
            return tensor

        future: Future[Any] = work.get_future()
        return future.then(result)

    def reduce_bytes(self, num_bytes: int) -> int:
        """What every rank sends for a ring all_reduce of `num_bytes`."""
        return 2 * num_bytes * (self.num_ranks - 1) // self.num_ranks

    def gather_rows(self, row: Tensor) -> Tensor:
        """Waits for every rank's `row` (m,), any dtype of equal shape: (num_ranks, m). Raises CommError."""
        try:
            rows: Tensor = self.all_gather(row.contiguous().view(torch.uint8)).wait()
        except RuntimeError as error:
            raise CommError(self.explain(error)) from error
        return rows.view(row.dtype)

    def sum_rows(self, tensor: Tensor) -> Tensor:
        """Waits for the sum of `tensor` over ranks, in place. Raises CommError."""
        try:
            total: Tensor = self.all_reduce(tensor).wait()
        except RuntimeError as error:
            raise CommError(self.explain(error)) from error
        return total

    def explain(self, error: Exception) -> str:
        """One line for a collective that failed."""
        return (
            f"rank {self.rank} of {self.num_ranks}: a collective failed, so another rank died or was too late "
            f"({' '.join(str(error).split())[:200]})"
        )
