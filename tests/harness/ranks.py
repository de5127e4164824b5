"""Ranks for tests: threads of one process, or a handful of real processes.

`run_ranks` gives each thread its own gloo process group over one HashStore, to be handed to the real
DistributedDataParallel: the collectives are gloo's own, over real sockets, and a rank costs milliseconds. torch has no
public way to make a process group outside its one global world; the two private calls below (torch 2.13) are the
only ones, and tests/comm/test_processes.py runs the same training in real processes, so that threads are not believed
blindly.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
TIMEOUT_S = 30.0  # of a collective; only a failing test waits for it

# A group whose last reference is dropped on one of its own threads, by a callback that has just finished, joins itself
# and ends the process ("Resource deadlock avoided", torch 2.13). So the latest groups live on for a while.
_alive: deque[dist.ProcessGroup] = deque(maxlen=32)


@dataclass(frozen=True)
class Rank:
    rank: int
    num_ranks: int
    group: dist.ProcessGroup
    store: dist.Store | None = None
    made: list[str] = field(default_factory=list)

    def subgroup(self, members: list[int]) -> dist.ProcessGroup:
        """A group of some of the ranks, this one among them; all of them make their groups in the same order."""
        assert self.store is not None
        name = f"{len(self.made)}: {members}"
        self.made.append(name)
        store = dist.PrefixStore(name, self.store)
        return _group(store, members.index(self.rank), len(members))


def run_ranks(num_ranks: int, body: Callable[[Rank], T]) -> list[T]:
    """Runs `body` on `num_ranks` threads and returns what they returned, in rank order.

    An exception on any rank is raised here, the first that happened; the others then run into TIMEOUT_S.
    """
    store = dist.HashStore()
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def main(rank: int) -> None:
        try:
            results[rank] = body(Rank(rank, num_ranks, _group(store, rank, num_ranks), store))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(num_ranks)]


def _group(store: dist.Store, rank: int, num_ranks: int) -> dist.ProcessGroup:
    backend = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, num_ranks, timedelta(seconds=TIMEOUT_S))
    group = dist.ProcessGroup(store, rank, num_ranks)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    _alive.append(group)
    return group


class Processes:
    """`num_ranks` spawned processes that run body(rank, connection), with a pipe to each.

    `body` must be importable (a function at the top of a module). Leaving the `with` block ends those still running.
    """

    def __init__(self, num_ranks: int, body: Callable[..., None], folder: Path, collective_timeout_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes: list[SpawnProcess] = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            arguments = (body, rank, num_ranks, str(folder / "store"), collective_timeout_s, theirs)
            self.pipes.append(ours)
            self.processes.append(context.Process(target=_process, args=arguments, daemon=True))

    def __enter__(self) -> Processes:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()

    def receive(self, rank: int, timeout_s: float) -> Any:
        """What `rank` sent next; its exception is raised here. TimeoutError after `timeout_s`."""
        if not self.pipes[rank].poll(timeout_s):
            raise TimeoutError(f"rank {rank} sent nothing within {timeout_s} s")
        answer = self.pipes[rank].recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _process(body: Callable[..., None], rank: int, num_ranks: int, path: str, timeout_s: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(path, num_ranks)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout_s)
        )
        body(rank, pipe)
    except BaseException as error:
        pipe.send(error)
        raise
