"""What a step costs this machine's processor, without any link: the half that runs in the measuring processes.

The method's own hook runs under the real DistributedDataParallel: for one worker on a gloo group of one, for more on
torch's `fake` process group, whose collectives return at once, an all_gather with a copy of the caller's message from
every rank. So any number of workers' messages is decoded in one process, and two numbers of workers give the cost of
one message more. What the collectives themselves cost is not in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from distrobust.bench.methods import Method
from distrobust.bench.rank import Say
from distrobust.bench.shapes import NUM_PARAMETERS, Pool
from distrobust.bench.step import backward, contenders


def measure(arguments: dict[str, Any], say: Say) -> dict[str, dict[str, list[float]]]:
    """Arguments: `methods` {number of workers: [as of Method.to_json]}, `steps` (timed, each).

    Returns for every method {number of workers: seconds of every step}.
    """
    pool = Pool(NUM_PARAMETERS, seed=0)
    measured: dict[str, dict[str, list[float]]] = {}
    for workers, described in arguments["methods"].items():
        with _pretended(int(workers)):
            ready = contenders([Method(**values) for values in described])
            for contender in ready:
                for _ in range(contender.method.warmup):
                    backward(contender, pool)
            for _ in range(arguments["steps"]):
                for contender in ready:
                    seconds = measured.setdefault(contender.method.name, {}).setdefault(workers, [])
                    seconds.append(backward(contender, pool))
            del ready, contender
    return measured


@contextlib.contextmanager
def _pretended(workers: int) -> Iterator[None]:
    """A default process group of `workers` in which this process is rank 0 and no other exists."""
    if workers == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    else:
        from torch.testing._internal.distributed import fake_pg  # registers the back end

        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=workers)
    try:
        yield
    finally:
        dist.destroy_process_group()
