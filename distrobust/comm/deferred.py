"""Compression for trainers that want the hook before there is an optimizer.

    deferred = Deferred(density=0.001, num_steps=...)
    strategy = DDPStrategy(ddp_comm_state=deferred, ddp_comm_hook=compression_hook)  # Lightning
    ...                                                      # the trainer wraps the model and makes the optimizers
    deferred.start(ddp, optimizers)                          # before it restores the optimizers from a checkpoint

Lightning registers the hook right after wrapping, makes the optimizers after that, restores them after that, and then
runs the first backward. Momentum must be taken over between the second and the third: an optimizer state that was
saved under compression holds none. Lightning registers hooks on CUDA only; `start` makes up for that on the CPU, where
training would otherwise be dense without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from distrobust.comm.hook import attach, compression_hook
from distrobust.comm.line import Part
from distrobust.comm.state import Compression
from distrobust.errors import ConfigError


class Deferred:
    """The hook's state until `start`, and behind the trainer's back the Compression afterwards.

    Takes the density and options of `distrobust.compress`. `compression` is None until `start`.
    """

    def __init__(self, density: float = 0.001, **options: Any) -> None:
        self.density = density
        self.options = options
        self.compression: Compression | None = None
        self._loaded: dict[str, Any] | None = None  # a state that came before `start`

    def start(
        self,
        model: DistributedDataParallel,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        **options: Any,
    ) -> Compression:
        """What `distrobust.compress` does; `options` known only now (scaler=) are added. Once a wrapped model."""
        # torch 2.13 has no public way to see a registered hook; tests/comm/test_deferred.py fails if it moves
        registered = any(state is self for _, state in getattr(model, "_comm_hooks", []))
        compression = attach(model, optimizer, self.density, register=not registered, **{**self.options, **options})
        if self._loaded is not None:
            compression.load_state_dict(self._loaded)
            self._loaded = None
        self.compression = compression
        return compression

    def state_dict(self) -> dict[str, Any]:
        """This rank's Compression.state_dict(), or what was loaded for it if nothing has started yet."""
        if self.compression is None:
            if self._loaded is None:
                raise ConfigError(_NOT_STARTED)
            return self._loaded
        return self.compression.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """At once, or when `start` is called."""
        if self.compression is None:
            self._loaded = state
        else:
            self.compression.load_state_dict(state)

    def part(self, parameter: Parameter, start: int, gradient: Tensor) -> Part:
        """For compression_hook."""
        return self._started().part(parameter, start, gradient)

    def reduce(self, bucket: Tensor, parts: list[Part], is_first: bool, is_last: bool) -> Future[Any]:
        """For compression_hook."""
        return self._started().reduce(bucket, parts, is_first, is_last)

    def _started(self) -> Compression:
        if self.compression is None:
            raise ConfigError(_NOT_STARTED)
        return self.compression


_NOT_STARTED = (
    "compression was deferred and never started: call start(model, optimizer) once both exist and before the first "
    "backward; under Lightning in a callback's on_fit_start"
)

__all__ = ["Deferred", "compression_hook"]
