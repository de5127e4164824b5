"""Everything of a phase that survives a restart."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distrobust.adversarial.folded import Folded
from distrobust.comm import choice
from distrobust.comm.hook import attach
from distrobust.comm.resize import resize
from distrobust.comm.state import Compression
from distrobust.comm.transport import Transport
from distrobust.config import CompressConfig, NoiseConfig, PhaseConfig
from distrobust.optim.accuracy_gradient import AccuracyGradient
from distrobust.optim.adaptive import NoiseAdaptive
from distrobust.optim.lanton import Lanton
from distrobust.optim.noise import Noise
from distrobust.train import optimizers, transfer
from distrobust.train.checkpoint import Loaded, Position


@dataclass(frozen=True)
class Best:
    """The highest held-out accuracy so far, robust where there is an attack, and after which epoch it was."""

    accuracy: float
    epoch: int


@dataclass
class TrainState:
    """One phase on one rank. `net` is the inner module, `ddp` its wrapper with the compression hook."""

    position: Position
    net: nn.Module
    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    compression: Compression
    transport: Transport
    """Between all ranks; that of the exchange itself, which may be between machines, where it has one level."""
    adaptive: NoiseAdaptive | Lanton | None  # around `optimizer`, or it itself
    accuracy_gradient: AccuracyGradient | None
    average: AveragedModel | None  # of the weights over time
    samples: int = 0
    best: Best | None = None
    collapsed: bool = False
    """Catastrophic overfitting has been seen."""
    delta: Tensor | None = None
    """Perturbation of free adversarial training, by place in this rank's batch."""
    folded: Folded | None = None
    multipliers: Mapping[str, float] = field(default_factory=dict)  # of the rate, by parameter; empty: all 1
    frozen_norms: list[nn.Module] = field(default_factory=list)  # they stay in evaluation mode
    failed_checkpoints: int = 0  # by this process, in this phase
    slow: frozenset[int] = frozenset()  # ranks that were when last looked

    @property
    def noise(self) -> Noise | None:
        """Of each layer's gradient, where rates follow it."""
        return None if self.adaptive is None else self.adaptive.noise

    def ratios(self) -> dict[str, float]:
        """Each parameter's rate over the schedule's: multiplier times what its noise allows. Empty: 1 for all."""
        measured = {} if self.adaptive is None else self.adaptive.ratios
        names = dict.fromkeys([*self.multipliers, *measured])
        return {name: self.multipliers.get(name, 1.0) * float(measured.get(name, 1.0)) for name in names}

    def attacked(self, x: Tensor) -> nn.Module:
        """What attacks run on: `net`, with its batch norms folded where it can be done. x: any inputs."""
        if self.folded is None:
            self.folded = Folded(self.net, x)
        return self.folded.current()

    @property
    def result(self) -> nn.Module:
        """The model the phase would leave now: the average, if there is one."""
        return self.net if self.average is None else self.average.module

    def adopt_average(self) -> None:
        """Puts the averaged weights and statistics into `net`, at the end of the phase."""
        if self.average is not None:
            self.net.load_state_dict(self.average.module.state_dict())

    def shared(self) -> dict[str, Any]:
        """The same on every rank."""
        return {
            "parameters": {name: p.detach() for name, p in self.net.named_parameters()},
            "optimizer": self.optimizer.state_dict() | ({"noise": None} if self.optimizer is self.adaptive else {}),
            "accuracy_gradient": None if self.accuracy_gradient is None else self.accuracy_gradient.state_dict(),
            "samples": self.samples,
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "collapsed": self.collapsed,
        }

    def own(self) -> dict[str, Any]:
        """This rank's."""
        return {
            "buffers": dict(self.net.named_buffers()),
            "compression": self.compression.state_dict(),
            "noise": None if self.noise is None else self.noise.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "delta": self.delta,
        }

    def load(self, loaded: Loaded) -> None:
        """Continues from a checkpoint, also from one of another number of ranks."""
        own = loaded.own[0]
        compression = own["compression"]
        if loaded.was_resized:
            place = self.transport
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
        if self.average is not None:
            self.average.load_state_dict(own["average"])
        self.samples = loaded.shared["samples"]
        self.best = Best(**loaded.shared["best"]) if loaded.shared["best"] else None
        self.collapsed = loaded.shared["collapsed"]
        delta = None if loaded.was_resized else own["delta"]  # by place in a batch of another size
        self.delta = None if delta is None else delta.to(next(self.net.parameters()).device)
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
    may_resize: bool = False,
) -> TrainState:
    """A phase at its first step. Without `compress` the hook runs dense, which is DDP alone to the bit.

    transport: between all ranks. rates: see ModelConfig; parameters of `net` are frozen by it for good. may_resize:
    the run may go on with other workers, so a hierarchical exchange is not chosen for it.
    """
    multipliers = transfer.multipliers(net, rates) if rates else {}
    frozen_norms = transfer.freeze_(net, multipliers) if rates else []
    ddp = _wrap(net, transport, device)
    optimizer, adaptive = optimizers.make(net, phase, noise, multipliers)
    chosen = compress or CompressConfig(density=1.0)
    if may_resize and chosen.exchange == "auto" and not chosen.step_ahead:
        chosen = chosen.model_copy(update={"exchange": choice.flat_exchange(transport.num_ranks)})
    compression = attach(
        ddp,
        adaptive or optimizer,
        chosen.density,
        num_steps=num_steps,
        **chosen.model_dump(exclude={"density"}),
        momentum="residual" if phase.optimizer == "sgd" else "optimizer",
        transport=None if chosen.exchange in ("auto", "hierarchical") else transport,
    )
    controller = AccuracyGradient(**phase.accuracy_gradient.model_dump()) if phase.accuracy_gradient else None
    average: AveragedModel | None = None
    if phase.average is not None:
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(phase.average), use_buffers=True)
    return TrainState(
        position,
        net,
        ddp,
        optimizer,
        compression,
        compression.settings.transport if compression.settings.transport.local is None else transport,
        adaptive,
        controller,
        average,
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
