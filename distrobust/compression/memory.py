"""The residual of one parameter: what was accumulated and not yet sent.

Deep Gradient Compression (Lin et al., ICLR 2018), sections 3.2 and 3.3, algorithm 4. Letters: g local gradient,
w weight, u velocity, v accumulated velocity, m momentum, N workers, S the coordinates sent.

    g <- g * min(1, clip / (sqrt(N) ||g||))     local gradient clipping, per tensor
    g <- g + weight_decay * w                   coupled weight decay, before accumulation
    u <- m u + g                                momentum correction
    v <- v + u                 (Nesterov: v <- v + g + m u)
    v[S] <- v[S] - sent;  u[S] <- 0             momentum factor masking

Differences from the paper: what leaves v is what receivers decode (rounding stays), not v[S]; for Nesterov u holds
torch's momentum buffer, so that the paper's u is m times ours and the two forms agree. Momentum 0 is plain error
feedback, for optimizers with a momentum of their own; it keeps no u.

A step is written to a second pair of buffers, so that a step that must not happen is dropped without a trace, to the
bit, whatever the gradient held: in-place sums cannot be undone once a NaN went in. Price: 2 n more floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distrobust.compression import native
from distrobust.errors import CheckpointError


@dataclass(frozen=True)
class Rule:
    """How one parameter accumulates. `clip` is the threshold of the global batch's gradient norm, for this tensor."""

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    masking: bool = True
    clip: float | None = None


class Residual:
    """u and v of one parameter, flat float32 in the order of the parameter's storage.

    `settled`: v is zero and u is the same on every rank, as after a dense step. True for a new residual.
    `threshold`: smallest magnitude selected last, `growth` its ratio to the one before: a guess for the next step,
    which decides how fast, not what, is selected.
    """

    def __init__(self, n: int, rule: Rule, device: torch.device) -> None:
        self.rule = rule
        self.settled = True
        self.threshold, self.growth = 0.0, 1.0
        self.v, self.next_v = _zeros(n, device), _zeros(n, device)
        size = n if rule.momentum else 0
        self.u, self.next_u = _zeros(size, device), _zeros(size, device)

    def commit(self, settled: bool) -> None:
        """The step written to next_u and next_v happened. Not calling this drops it."""
        self.u, self.next_u = self.next_u, self.u
        if not (self.settled and settled):  # from one dense step to the next v is zero and stays so, untouched
            self.v, self.next_v = self.next_v, self.v
        self.settled = settled

    def load(self, u: Tensor, v: Tensor, settled: bool) -> None:
        """Takes flat u and v of the same sizes; raises CheckpointError otherwise."""
        if u.numel() != self.u.numel() or v.numel() != self.v.numel():
            raise CheckpointError(
                f"residual of {u.numel()} + {v.numel()} values, expected {self.u.numel()} + {self.v.numel()}: "
                "the checkpoint is of another model or momentum setting"
            )
        self.u.copy_(u)
        self.v.copy_(v)
        self.settled = settled


def _zeros(n: int, device: torch.device) -> Tensor:
    return torch.zeros(n, dtype=torch.float32, device=device)


def clip_factor(g: Tensor, rule: Rule, num_workers: int) -> Tensor | float:
    """What a local gradient g is multiplied with before accumulation; 1.0 without clipping."""
    if rule.clip is None:
        return 1.0
    norm = torch.linalg.vector_norm(g, dtype=torch.float32)
    scale = rule.clip / (math.sqrt(num_workers) * norm)
    return torch.where(norm > 0, scale.clamp(max=1.0), torch.ones_like(norm))


def decayed(g: Tensor, w: Tensor, rule: Rule, factor: Tensor | float = 1.0) -> Tensor:
    """factor * g with weight decay: float32, a new tensor unless neither changes a float32 g."""
    g = g.to(torch.float32)
    if isinstance(factor, Tensor) or factor != 1.0:
        g = g * factor
    return g.add(w, alpha=rule.weight_decay) if rule.weight_decay else g


def accumulate(residual: Residual, g: Tensor) -> None:
    """Writes next_u and next_v for a local gradient g (n,) float32; u and v stay."""
    step = velocity(residual, g)
    torch.add(residual.v, step, out=residual.next_v)


def velocity(residual: Residual, g: Tensor) -> Tensor:
    """Writes next_u and returns this step's update, as torch.optim.SGD computes it (same order, same bits)."""
    rule = residual.rule
    if not rule.momentum:
        return g
    torch.mul(residual.u, rule.momentum, out=residual.next_u).add_(g)
    return g.add(residual.next_u, alpha=rule.momentum) if rule.nesterov else residual.next_u


class Buffers(Protocol):
    """What a step is written to: a residual's own next buffers, or a copy of several residuals'."""

    next_u: Tensor
    next_v: Tensor
    rule: Rule


def remove_sent(residual: Buffers, places: Tensor, sent: Tensor, first: int = 0) -> None:
    """Takes `sent` (k,) float32, as receivers decode it, out of next_v at `places` (k,) int64 - first; masks next_u.

    Places are distinct.
    """
    masked = residual.next_u if residual.rule.masking and residual.rule.momentum else None
    if native.takes(residual.next_v, places, sent):
        native.remove(residual.next_v, masked, places, first, sent)
        return
    indices = places - first
    residual.next_v.index_add_(0, indices, sent, alpha=-1)
    if masked is not None:
        masked.index_fill_(0, indices, 0.0)
