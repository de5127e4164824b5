"""One data-parallel worker, small enough that a test's subject stays visible."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distrobust
from distrobust.comm.state import Compression

_SEED = threading.Lock()  # torch's global generator is shared by the threads
INPUTS, CLASSES = 20, 10


def mlp() -> nn.Module:
    """5,140 parameters: with fuse_below=100 three tensors are selected by themselves and three biases together."""
    return nn.Sequential(nn.Linear(INPUTS, 60), nn.Tanh(), nn.Linear(60, 55), nn.Tanh(), nn.Linear(55, CLASSES))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with _SEED:
        torch.manual_seed(seed)
        return build()


def batch(step: int, rank: int, size: int = 8) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(size, INPUTS, generator=g), torch.randint(CLASSES, (size,), generator=g)


@dataclass
class Worker:
    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    compression: Compression | None
    rank: int

    def backward(self, step: int) -> None:
        self.optimizer.zero_grad()
        x, y = batch(step, self.rank)
        nn.functional.cross_entropy(self.ddp(x), y).backward()

    def step(self, step: int) -> None:
        self.backward(step)
        self.optimizer.step()

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.ddp.module.named_parameters()}

    @property
    def state(self) -> Compression:
        assert self.compression is not None
        return self.compression


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def worker(
    rank: Any,
    build: Callable[[], nn.Module] = mlp,
    *,
    density: float | None = 0.02,
    sgd: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    **options: Any,
) -> Worker:
    """`rank`: a harness Rank. density None: plain DDP + optimizer, no hook. `options` go to distrobust.compress."""
    net = seeded(build)
    wrapped = DistributedDataParallel(net, process_group=rank.group, **(ddp or {}))
    made = optimizer(wrapped.parameters()) if optimizer else torch.optim.SGD(wrapped.parameters(), **(sgd or SGD))
    compression = None
    if density is not None:
        compression = distrobust.compress(wrapped, made, density=density, **{"fuse_below": 100, **options})
    return Worker(wrapped, made, compression, rank.rank)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two dictionaries of tensors agree to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def residuals(state: Compression) -> dict[str, Tensor]:
    """A copy of every u and v."""
    both = {}
    for name, residual in state.residuals.items():
        both[f"{name}.u"], both[f"{name}.v"] = residual.u.clone(), residual.v.clone()
    return both
