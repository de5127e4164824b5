"""Everything of a phase that survives a restart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distrobust.comm.hook import attach
from distrobust.comm.resize import resize
from distrobust.comm.state import Compression
from distrobust.comm.transport import Transport
from distrobust.config import CompressConfig, NoiseConfig, PhaseConfig
from distrobust.optim.accuracy_gradient import AccuracyGradient
from distrobust.optim.adaptive import NoiseAdaptive
from distrobust.train import transfer
from distrobust.train.checkpoint import Loaded, Position


@dataclass
class TrainState:
    """One phase on one rank. `net` is the inner module, `ddp` its wrapper with the compression hook."""

    position: Position
    net: nn.Module
    ddp: DistributedDataParallel
    optimizer: torch.optim.SGD
    compression: Compression
    adaptive: NoiseAdaptive | None  # around `optimizer`
    accuracy_gradient: AccuracyGradient | None
    samples: int = 0
    multipliers: Mapping[str, float] = field(default_factory=dict)  # of the rate, by parameter; empty: all 1
    frozen_norms: list[nn.Module] = field(default_factory=list)  # they stay in evaluation mode

    def ratios(self) -> dict[str, float]:
        """Each parameter's rate over the schedule's: multiplier times what its noise allows. Empty: 1 for all."""
        measured = {} if self.adaptive is None else self.adaptive.ratios
        names = dict.fromkeys([*self.multipliers, *measured])
        return {name: self.multipliers.get(name, 1.0) * measured.get(name, 1.0) for name in names}

    def shared(self) -> dict[str, Any]:
        """The same on every rank."""
        return {
            "parameters": {name: p.detach() for name, p in self.net.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "accuracy_gradient": None if self.accuracy_gradient is None else self.accuracy_gradient.state_dict(),
            "samples": self.samples,
        }

    def own(self) -> dict[str, Any]:
        """This rank's."""
        return {
            "buffers": dict(self.net.named_buffers()),
            "compression": self.compression.state_dict(),
            "noise": None if self.adaptive is None else self.adaptive.noise.state_dict(),
        }

    def load(self, loaded: Loaded) -> None:
        """Continues from a checkpoint, also from one of another number of ranks."""
        own = loaded.own[0]
        compression = own["compression"]
        if loaded.was_resized:
            place = self.compression.settings.transport
            own = loaded.own[place.rank % len(loaded.own)]  # batch-norm statistics and the last gradient, for its noise
            compression = resize([one["compression"] for one in loaded.own], place.rank, place.num_ranks)
        self.compression.load_state_dict(compression)
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(loaded.shared["parameters"][name])
            for name, buffer in self.net.named_buffers():
                buffer.copy_(own["buffers"][name])
        self.optimizer.load_state_dict(loaded.shared["optimizer"])
        if self.adaptive is not None:
            self.adaptive.load_noise(own["noise"])
        if self.accuracy_gradient is not None:
            self.accuracy_gradient.load_state_dict(loaded.shared["accuracy_gradient"])
        self.samples = loaded.shared["samples"]
        self.position = loaded.position


def make_state(
    net: nn.Module,
    position: Position,
    phase: PhaseConfig,
    compress: CompressConfig | None,
    noise: NoiseConfig | None,
    num_steps: int,
    transport: Transport,
    device: torch.device,
    rates: Mapping[str, float] | None = None,
) -> TrainState:
    """A phase at its first step. Without `compress` the hook runs dense, which is DDP with SGD to the bit.

    rates: see ModelConfig; parameters of `net` are frozen by it for good.
    """
    multipliers = transfer.multipliers(net, rates) if rates else {}
    frozen_norms = transfer.freeze_(net, multipliers) if rates else []
    ddp = _wrap(net, transport, device)
    optimizer = torch.optim.SGD(
        transfer.parameter_groups(net, multipliers, phase.schedule.peak) if rates else net.parameters(),
        lr=phase.schedule.peak,
        momentum=phase.momentum,
        nesterov=phase.nesterov,
        weight_decay=phase.weight_decay,
    )
    adaptive = NoiseAdaptive(optimizer, net, alpha=noise.alpha, beta2=noise.beta2) if noise else None
    chosen = compress or CompressConfig(density=1.0)
    compression = attach(
        ddp,
        adaptive or optimizer,
        chosen.density,
        num_steps=num_steps,
        **chosen.model_dump(exclude={"density"}),
        transport=None if chosen.exchange in ("auto", "hierarchical") else transport,
    )
    controller = AccuracyGradient(**phase.accuracy_gradient.model_dump()) if phase.accuracy_gradient else None
    return TrainState(
        position,
        net,
        ddp,
        optimizer,
        compression,
        adaptive,
        controller,
        multipliers=multipliers,
        frozen_norms=frozen_norms,
    )


def _wrap(net: nn.Module, transport: Transport, device: torch.device) -> DistributedDataParallel:
    """DDP that sends gradients and nothing else: every rank builds the same weights, batch norm is averaged by us."""
    options: dict[str, Any] = {"init_sync": False, "gradient_as_bucket_view": True}
    # torch 2.13 renamed broadcast_buffers and warns about the old name; older ones know no other
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(net, device_ids=devices, process_group=transport.group, **options)
