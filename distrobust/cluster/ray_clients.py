"""Simulated clients on Ray actors, which pull cohorts as they become idle: several cores, or several machines.

An actor computes exactly what the simulation's own process would, and answers are used in the order of the cohorts.
So the number of actors changes no bit, on processors of one kind: another kind may multiply matrices in another order.
An actor that dies is started again and its cohort with it, up to RESTARTS times.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distrobust.cluster.ray_session import missing, session
from distrobust.errors import CommError, ConfigError
from distrobust.federated import settings
from distrobust.federated.work import Answer, Task, Worker, Workers

RESTARTS = 3


@contextmanager
def on_actors(worker: Worker) -> Iterator[Workers]:
    """The same work, done by execute.actors actors."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # before ray is imported
    execute = worker.config.execute
    assert execute.actors is not None
    cpus = execute.actors * execute.threads
    environment = {"env_vars": {"OMP_NUM_THREADS": str(execute.threads)}}
    with session(execute.address, "execute.address", cpus, environment):
        lacking = missing({"CPU": cpus}, f"execute: {execute.actors} actors", "execute.actors or execute.threads")
        if lacking is not None:
            raise ConfigError(lacking)
        import ray

        remote = ray.remote(num_cpus=execute.threads, max_restarts=RESTARTS, max_task_retries=RESTARTS)(Actor)
        config = worker.config.model_dump(mode="json")
        shared = [ray.put(one) for one in (worker.module, worker.images.numpy(), worker.labels.numpy())]
        pool = _Pool([remote.remote(config, shared) for _ in range(execute.actors)])
        yield pool.answers


class Actor:
    """A worker elsewhere. shared: references to its module, images and labels, which the simulation holds."""

    def __init__(self, config: dict[str, Any], shared: list[Any]) -> None:
        import ray

        module, images, labels = ray.get(shared)
        with warnings.catch_warnings():  # both lie in Ray's shared memory, and nobody writes to them
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            parsed = settings.parse(config, "driver")
            torch.set_num_threads(parsed.execute.threads)
            self.worker = Worker(parsed, module, torch.from_numpy(images), torch.from_numpy(labels))

    def work(self, task: Task) -> Answer:
        return self.worker(task)


class _Pool:
    """One cohort at a time for each actor."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def answers(self, tasks: Iterable[Task]) -> Iterator[Answer]:
        import ray

        idle, busy, given = list(self._actors), dict[Any, Any](), deque[Any]()
        for task in tasks:
            if not idle:
                [ready], _ = ray.wait(list(busy), num_returns=1)
                idle.append(busy.pop(ready))
            actor = idle.pop()
            promise = actor.work.remote(task)
            busy[promise] = actor
            given.append(promise)
            while given and given[0] not in busy:
                yield _got(given.popleft())
        while given:
            yield _got(given.popleft())


def _got(promise: Any) -> Answer:
    import ray

    try:
        answer: Answer = ray.get(promise)
    except ray.exceptions.RayActorError as error:
        reason = " ".join(str(error).split())[:200]
        raise CommError(
            f"an actor died more than {RESTARTS} times ({reason}); start again to continue from the last checkpoint"
        ) from None
    return answer
