"""What a step costs this machine's processor where nothing is exchanged: the half that runs in the measuring processes.

The method's own hook runs under the real DistributedDataParallel, on a gloo group of one.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from distrobust.bench.methods import Method
from distrobust.bench.rank import Say
from distrobust.bench.shapes import NUM_PARAMETERS, Pool
from distrobust.bench.step import backward, contenders


def measure(arguments: dict[str, Any], say: Say) -> dict[str, list[float]]:
    """Arguments: `methods` (as of Method.to_json), `steps`. Returns seconds of every step by method."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        pool = Pool(NUM_PARAMETERS, seed=0)
        measured: dict[str, list[float]] = {}
        for contender in contenders([Method(**values) for values in arguments["methods"]]):
            for _ in range(contender.method.warmup):
                backward(contender, pool)
            measured[contender.method.name] = [backward(contender, pool) for _ in range(arguments["steps"])]
        return measured
    finally:
        dist.destroy_process_group()
