"""The ways to exchange gradients that are compared: a name, and a function that installs a hook on a DDP model.

A method of your own is `Method("its name", "module:function", {"option": 1})`: `function(model, option=1)` registers a
communication hook on the DistributedDataParallel model, in every host. It may return an object whose `sent_bytes` says
what it counted itself (distrobust's Compression does), or None.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from distrobust.errors import ConfigError

SETTLED = 8  # steps of ours until the guesses of thresholds stand still: in a young residual they grow with every step
FLOOR, DENSE, FP16 = "floor: nothing is sent", "dense fp32 (plain DDP)", "16-bit (torch's fp16 hook)"


@dataclass(frozen=True)
class Method:
    """`install`: 'module:function', called with the DDP model and `options`; `ddp`: arguments of the wrapper itself."""

    name: str
    install: str
    options: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    warmup: int = 2  # steps before the first that counts: DDP arranges its buckets anew after the first
    doubtful: bool = False  # may crash: tried on its own first, and left out with the reason if it does

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def standard(densities: Sequence[float], values: Sequence[str] = ()) -> list[Method]:
    """Floor, dense, 16-bit and PowerSGD as torch has them, and ours at every density and value code (none: default)."""
    here = __name__
    methods = [
        Method(FLOOR, f"{here}:floor"),
        Method(DENSE, f"{here}:dense"),
        Method(FP16, f"{here}:fp16"),
        # with several buckets, torch 2.13's hook mixes up their collectives on gloo and the process aborts
        Method("PowerSGD rank 1 (torch)", f"{here}:power_sgd", {"rank": 1}, warmup=4, doubtful=True),
        Method(
            "PowerSGD rank 1 (torch, one bucket)", f"{here}:power_sgd", {"rank": 1}, {"bucket_cap_mb": 200}, 4, True
        ),
    ]
    for density in densities:
        for code in values or [""]:
            name = f"distrobust {percent(density)}" + (f", {code}" if code else "")
            options = {"density": density} | ({"values": code} if code else {})
            methods.append(Method(name, f"{here}:ours", options, warmup=SETTLED))
    return methods


def parse_densities(text: str) -> list[float]:
    """'0.01,0.001' -> [0.01, 0.001]. ConfigError for anything that is no share above 0 and up to 1."""
    densities = []
    for part in text.split(","):
        try:
            density = float(part)
        except ValueError:
            density = 0.0
        if not 0.0 < density <= 1.0:
            raise ConfigError(f"densities: got {part.strip()!r}, wanted shares of the coordinates such as 0.01,0.001")
        densities.append(density)
    return densities


def percent(density: float) -> str:
    return f"{100 * density:.4g} %"


def floor(model: DistributedDataParallel) -> None:
    """Returns the bucket as it is: what a backward costs that sends nothing."""
    from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

    model.register_comm_hook(None, noop_hook)


def dense(model: DistributedDataParallel) -> None:
    """No hook at all: DDP's own all-reduce."""


def fp16(model: DistributedDataParallel) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    model.register_comm_hook(None, fp16_compress_hook)


def power_sgd(model: DistributedDataParallel, rank: int) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    logging.getLogger(powerSGD_hook.__name__).setLevel(logging.ERROR)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def ours(model: DistributedDataParallel, density: float, **options: Any) -> Any:
    import distrobust

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return distrobust.compress(model, optimizer, density, warmup=0.0, **options)
