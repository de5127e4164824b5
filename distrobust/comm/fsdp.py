"""FSDP2's hybrid sharding: shards inside a machine, compressed gradients between machines.

    mesh = init_device_mesh("cuda", (num_machines, gpus), mesh_dim_names=("machine", "gpu"))
    fully_shard(layer, mesh=mesh["gpu"])                  # each layer, then the model, on the mesh inside the machine
    fully_shard(model, mesh=mesh["gpu"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    compression = compress_sharded(model, optimizer, mesh["machine"].get_group(), density=0.001)

torch reduce-scatters each layer's gradient inside the machine and hands the result, one flat tensor with this rank's
shards, to an all-reduce hook. There it is accumulated, selected and exchanged among the ranks of equal place in their
machines; each holds the residual of its own shards only. What lies where in it: fsdp_layers.py.

Differences from the DDP hook, since torch's hook writes each layer's gradient before it has seen the next layer's:
- Small tensors are selected together within a layer, not over the whole model.
- Residuals are committed in optimizer.step(), where all ranks of a machine agree whether all layers were finite.
- One reduced backward a step. Accumulate with set_requires_gradient_sync(False), which skips the hook; torch ignores
  set_requires_all_reduce(False) on a mesh of one dimension and would call it each time.
- Every layer must run on all machines or on none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distrobust.comm import fsdp_layers, saved, takeover
from distrobust.comm.fsdp_layers import Layer, Piece
from distrobust.comm.transport import Transport
from distrobust.compression import codec, memory, message
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES, Code, Space
from distrobust.compression.density import LADDER, Schedule, planned
from distrobust.compression.memory import Residual
from distrobust.compression.message import Layout
from distrobust.compression.select import SELECTORS, Selector, num_selected
from distrobust.errors import CheckpointError, CodecError, ConfigError

_log = logging.getLogger(__name__)


class ShardedCompression:
    """State of the all-reduce hooks of a sharded model. Made by `compress_sharded`.

    `step`: optimizer steps seen, skipped ones included. `skipped`: the last one met a non-finite gradient somewhere.
    """

    def __init__(
        self,
        shards: dist.ProcessGroup,
        machines: Transport,
        code: Code,
        select: Selector,
        density: Schedule,
        fuse_below: int,
    ) -> None:
        self.shards = Transport(shards)
        self.machines = machines
        self.code = code
        self.select = select
        self.density = density
        self.fuse_below = fuse_below
        self.layers: list[Layer] = []
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._seen: list[Layer] = []  # whose gradients were exchanged since the last optimizer step
        self._finite = True
        self._dense = False

    @property
    def skipped(self) -> bool:
        return self.skipped_in_a_row > 0

    @property
    def sent_bytes(self) -> int:
        """Bytes this rank has sent between machines."""
        return self.machines.sent_bytes

    @property
    def pieces(self) -> dict[str, Piece]:
        return {piece.name: piece for layer in self.layers for piece in layer.pieces}

    def density_at(self, step: int) -> float:
        """Density of a step; 1.0 where sparse messages would be larger than a dense all-reduce."""
        density = self.density.at(step)
        n = sum(piece.size for piece in self.pieces.values())
        if density >= 1.0 or n == 0:
            return density
        sparse = (self.machines.num_ranks - 1) * codec.num_bytes(Space(n, (num_selected(n, density),)), self.code)
        return density if self.machines.num_ranks == 1 or sparse < self.machines.reduce_bytes(4 * n) else 1.0

    def reduce_(self, layer: Layer, output: Tensor) -> None:
        """The all-reduce hook: overwrites `output` (layer.numel,), the mean inside this machine, by that over all."""
        if output.numel() != layer.numel:
            raise ConfigError(
                f"layer {layer.name!r}: got a gradient of {output.numel()} elements, wanted {layer.numel}: a parameter "
                "was not used in this backward; call model.set_reduce_scatter_unused_params(True)"
            )
        if self._seen and self._seen[0].pieces[0].parameter.grad is None:
            self._seen.clear()  # the gradients of an earlier backward were thrown away
        if layer in self._seen:
            raise ConfigError(
                f"layer {layer.name!r}: reduced twice before optimizer.step(); accumulate with "
                "model.set_requires_gradient_sync(False) for all but the last backward; run each layer once a forward"
            )
        if not self._seen:
            self._finite = True
            self._dense = self.density_at(self.step) == 1.0
        self._seen.append(layer)
        gradient = output.to(torch.float32)
        mean = self._reduce_dense(layer, gradient) if self._dense else self._reduce_sparse(layer, gradient)
        if mean is None:
            self._finite = False
            output.fill_(math.nan)
        else:
            output.copy_(mean)

    def _reduce_sparse(self, layer: Layer, gradient: Tensor) -> Tensor | None:
        """The mean (layer.numel,), or None if some machine's values are not finite. One all_gather."""
        accumulated = torch.zeros_like(gradient)
        for piece in layer.pieces:
            g = gradient[piece.start : piece.end]
            memory.accumulate(piece.residual, memory.decayed(g, piece.weight(), piece.residual.rule))
            accumulated[piece.start : piece.end] = piece.residual.next_v
        indices, k = self._select(layer, accumulated)
        layout = Layout(Space(layer.numel, (k,)), self.code, num_parameters=0, step=self.step)
        if bool(torch.isfinite(accumulated.sum())):
            payload = None
            if k:
                payload, indices, sent = codec.encode(indices, accumulated[indices], layout.space, self.code)
                fsdp_layers.remove_sent(layer, indices, sent)
            empty = torch.zeros(0, device=gradient.device)
            packed = message.pack(layout, message.header(empty.bool(), empty), payload)
        else:
            packed = message.pack_status(layout, message.NON_FINITE, gradient.device)
        received = self.machines.gather_rows(packed)
        return self._decode(layer, layout, received)

    def _select(self, layer: Layer, accumulated: Tensor) -> tuple[Tensor, int]:
        """Indices (k,) into reduce_output, ascending. How many does not depend on the values."""
        density = self.density_at(self.step)
        chosen, small, k = [], [], 0
        finite = bool(torch.isfinite(accumulated.sum()))
        for piece in layer.pieces:
            if 0 < piece.size < self.fuse_below:
                small.append(torch.arange(piece.start, piece.end, device=accumulated.device))
            elif piece.size:
                k += num_selected(piece.size, density)
                if finite:
                    values = accumulated[piece.start : piece.end]
                    chosen.append(self.select(values, num_selected(piece.size, density)) + piece.start)
        if small:
            places = torch.cat(small)
            k += num_selected(places.numel(), density)
            if finite:
                chosen.append(places[self.select(accumulated[places], num_selected(places.numel(), density))])
        if not chosen:
            return torch.zeros(0, dtype=torch.int64, device=accumulated.device), k
        return torch.cat(chosen).sort().values, k

    def _decode(self, layer: Layer, layout: Layout, received: Tensor) -> Tensor | None:
        mean = torch.zeros(layer.numel, device=received.device)
        finite = True
        for machine, row in enumerate(received):  # in the order of machines, so that all get the same bits
            try:
                one = message.unpack(layout, row)
            except CodecError as error:
                raise CodecError(
                    f"step {self.step}, message of machine {machine} for layer {layer.name!r}: {error}; nothing was "
                    "applied"
                ) from None
            finite = finite and not one.status
            mean.index_add_(0, one.indices, one.values)
        return mean.div_(len(received)) if finite else None

    def _reduce_dense(self, layer: Layer, gradient: Tensor) -> Tensor | None:
        """As DDP with SGD while residuals are settled; otherwise v and u are reduced once, which settles them."""
        mean = torch.zeros_like(gradient)
        if all(piece.residual.settled for piece in layer.pieces):
            reduced = self.machines.sum_rows(gradient.div(self.machines.num_ranks))
            if not bool(torch.isfinite(reduced.sum())):
                return None
            for piece in layer.pieces:
                g = reduced[piece.start : piece.end]
                local = memory.decayed(g, piece.weight(), piece.residual.rule)
                mean[piece.start : piece.end] = memory.velocity(piece.residual, local)
            return mean
        for piece in layer.pieces:
            g = gradient[piece.start : piece.end]
            memory.accumulate(piece.residual, memory.decayed(g, piece.weight(), piece.residual.rule))
        halves = [half for piece in layer.pieces for half in (piece.residual.next_v, piece.residual.next_u)]
        reduced = self.machines.sum_rows(torch.cat(halves).div_(self.machines.num_ranks))
        if not bool(torch.isfinite(reduced.sum())):
            return None
        both = iter(reduced.split([half.numel() for half in halves]))
        for piece in layer.pieces:
            mean[piece.start : piece.end] = next(both)
            piece.residual.next_v.zero_()
            piece.residual.next_u.copy_(next(both))
        return mean

    def finish_step(self) -> None:
        """Before the optimizer's update: commits all layers on all ranks, or drops the gradients on all.

        Machines know of each other's layers from the messages; the ranks of one machine tell each other here.
        """
        if self._seen:
            device = self._seen[0].pieces[0].residual.v.device
            bad = self.shards.sum_rows(torch.full((1,), 0.0 if self._finite else 1.0, device=device))
            if bool(bad > 0):
                self.skipped_steps += 1
                self.skipped_in_a_row += 1
                _log.warning("step %d: non-finite gradient on some rank, step skipped on all", self.step)
            else:
                self.skipped_in_a_row = 0
                for layer in self._seen:
                    for piece in layer.pieces:
                        piece.residual.commit(settled=self._dense)
            self.step += 1
            self._seen.clear()
        if self.skipped:
            for piece in self.pieces.values():
                piece.parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Residuals of this rank's shards, in the shards' shapes, by parameter name."""
        return {
            **saved.save(*self._residuals()),
            "place": self._place,
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "sent_bytes": self.machines.sent_bytes,
        }

    def _residuals(self) -> tuple[dict[str, Residual], dict[str, Tensor]]:
        """With the shards they belong to."""
        residuals = {name: piece.residual for name, piece in self.pieces.items()}
        return residuals, {name: fsdp_layers.local(piece.parameter) for name, piece in self.pieces.items()}

    @property
    def _place(self) -> tuple[int, ...]:
        """machine, of how many; shard, of how many"""
        return (self.machines.rank, self.machines.num_ranks, self.shards.rank, self.shards.num_ranks)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the same rank's `state_dict()`; CheckpointError, changing nothing, if it does not fit."""
        if tuple(state["place"]) != self._place:
            text = "machine {} of {}, shard {} of {}"
            raise CheckpointError(
                f"residual of {text.format(*state['place'])}, this is {text.format(*self._place)}: continue with the "
                "same mesh"
            )
        saved.load(state, *self._residuals())
        self.step = state["step"]
        self.skipped_steps = state["skipped_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.machines.sent_bytes = state["sent_bytes"]


def compress_sharded(
    model: FSDPModule,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    machines: dist.ProcessGroup,
    density: float = 0.001,
    *,
    num_steps: int | None = None,
    warmup: float = 0.2,
    ladder: tuple[float, ...] = LADDER,
    values: str = "4bit",
    indices: str = "elias_fano",
    selector: str = "sampled",
    momentum: str = "residual",
    masking: bool = True,
    fuse_below: int = 2048,
) -> ShardedCompression:
    """Sets the all-reduce hook of every layer of `model` and takes over momentum; options as in distrobust.compress.

    `machines`: the group of ranks that hold the same shards, one in each machine. The shards of its first rank are
    copied to the others, as DDP does; buffers are not. Raises ConfigError for what cannot be right.
    """
    if not isinstance(model, FSDPModule):
        raise ConfigError(f"compress_sharded: got a {type(model).__name__}, wanted a model passed through fully_shard")
    tables = {
        "values": (values, tuple(VALUE_CODES)),
        "indices": (indices, tuple(INDEX_CODES)),
        "selector": (selector, tuple(SELECTORS)),
        "momentum": (momentum, ("residual", "optimizer")),
    }
    for path, (value, names) in tables.items():
        if value not in names:
            raise ConfigError(f"compress.{path}: got {value!r}, wanted one of {', '.join(names)}")
    schedule = planned(density, num_steps, warmup, ladder)
    if takeover.noise_adaptive(optimizer) is not None:
        raise ConfigError(
            "compress_sharded: got an optimizer that measures gradient noise (NoiseAdaptive, Lanton) and needs whole "
            "gradients; take another, or DistributedDataParallel and distrobust.compress"
        )
    found = fsdp_layers.find(model)
    parameters = {name: parameter for _, _, named in found for name, parameter in named.items()}
    optimizers = takeover.unwrapped(optimizer)
    if momentum == "residual":
        taken = takeover.take_over(optimizers, parameters, masking=masking, clip=None)
    else:
        taken = takeover.leave_in_place(optimizers, parameters, clip=None)
    first = next(iter(parameters.values()))
    assert isinstance(first, DTensor)
    shards = first.device_mesh.get_group()
    code = Code(VALUE_CODES[values], INDEX_CODES[indices])
    state = ShardedCompression(shards, Transport(machines), code, SELECTORS[selector], schedule, fuse_below)
    for name, module, named in found:
        pieces, start = [], 0
        for parameter_name, parameter in named.items():
            local = fsdp_layers.local(parameter.detach())
            residual = Residual(local.numel(), taken.rules[parameter_name], local.device)
            buffer = taken.momentum_buffers.get(parameter_name)
            if buffer is not None:
                residual.u.copy_(fsdp_layers.local(buffer).reshape(-1))
            pieces.append(Piece(parameter_name, parameter, residual, start, local.numel()))
            start += fsdp_layers.padded_numel(parameter)
            if local.numel():
                dist.broadcast(local, group=machines, group_src=0)
        layer = Layer(name, pieces, start)
        state.layers.append(layer)
        module.set_all_reduce_hook(partial(state.reduce_, layer))
    if hasattr(model, "set_reduce_scatter_unused_params"):  # torch 2.13; otherwise unused parameters are refused
        model.set_reduce_scatter_unused_params(True)
    takeover.complete_(optimizers, taken, momentum == "residual", [state.finish_step])
    return state
