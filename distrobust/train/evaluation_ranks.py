"""Starting the ranks of an evaluation: this process, processes on this machine, or torchrun's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from distrobust.errors import CommError, ConfigError, DistrobustError
from distrobust.train.evaluation import Job, Opened, Progress, record, run_rank
from distrobust.train.launch import is_torchrun

POLL_S = 0.2


def evaluate(job: Job, workers: int = 1, progress: Progress | None = None) -> dict[str, Any] | None:
    """The record of the evaluation (evaluation.record); None on torchrun's ranks other than 0.

    What a start with the same directory has found is kept and not done again. Raises CommError if a worker died,
    DistrobustError of any kind that a rank meets.
    """
    rank, num_ranks = 0, 1
    if is_torchrun():
        rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if workers != 1:
            raise ConfigError(f"--workers {workers}: torchrun has started {num_ranks} already; leave --workers out")
    _set_threads(job, int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)) if num_ranks > 1 else workers)
    opened = Opened(job)
    opened.directory.open(opened.settings())
    if workers > 1:
        _in_processes(opened, min(workers, opened.num_batches), progress)
    else:
        run_rank(opened, rank, num_ranks, progress)
    if rank != 0:
        return None
    while not _complete(opened, progress):  # torchrun ends this process if another rank fails
        time.sleep(POLL_S)
    return record(opened)


def _set_threads(job: Job, num_local: int) -> None:
    """num_local: ranks on this machine, which share its cores."""
    if job.threads or num_local > 1:
        torch.set_num_threads(job.threads or max(1, (os.cpu_count() or 1) // num_local))


def _complete(opened: Opened, progress: Progress | None) -> bool:
    for trial, num in opened.done(opened.directory.read()):
        if num < opened.num_batches:
            if progress is not None:
                progress(trial.describe(), num, opened.num_batches)
            return False
    return True


def _in_processes(opened: Opened, workers: int, progress: Progress | None) -> None:
    """One process a rank, spawned; all are gone when this returns or raises."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(workers)]
    processes = [
        context.Process(target=_worker, args=(opened.job, rank, workers, os.getpid(), pipe[1]), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        while any(process.is_alive() for process in processes):
            _raise_first(opened, processes, [receiver for receiver, _ in pipes])
            _complete(opened, progress)
            time.sleep(POLL_S)
        _raise_first(opened, processes, [receiver for receiver, _ in pipes])
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _raise_first(opened: Opened, processes: list[Any], receivers: list[Connection]) -> None:
    """The error that a worker met, if one did."""
    for rank, (process, receiver) in enumerate(zip(processes, receivers, strict=True)):
        if process.exitcode not in (None, 0):
            try:
                if receiver.poll():
                    raise receiver.recv()
            except EOFError:
                pass
            raise CommError(
                f"evaluation: worker {rank} ended with exit code {process.exitcode}; what was found so far is in "
                f"{opened.job.out}: start again to continue"
            )


def _worker(job: Job, rank: int, num_ranks: int, parent: int, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; the first process says so
    try:
        _set_threads(job, num_ranks)
        run_rank(Opened(job), rank, num_ranks, abandoned=lambda: os.getppid() != parent)
    except DistrobustError as error:
        sender.send(error)
        raise SystemExit(1) from None
