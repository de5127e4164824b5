"""What a client does with the model it downloads: local steps on its own rows, a whole cohort at a time.

Letters: x the round's model, y the client's, g a batch gradient, eta the local rate.

    FedAvg    (McMahan et al., AISTATS 2017)      y <- y - eta g
    FedProx   (Li et al., MLSys 2020, eq. 2)      g <- g + mu (y - x), of the loss + mu/2 ||y - x||^2
    SCAFFOLD  (Karimireddy et al., ICML 2020)     g <- g - c_i + c
    DiLoCo    (Douillard et al., 2023)            AdamW instead of y - eta g

Optimizer state lives for one round. The update is x - y: a gradient to the server.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distrobust.federated.attacked import Adversary
from distrobust.federated.batches import Batches
from distrobust.federated.network import Network, Stacked
from distrobust.federated.settings import LocalConfig

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of AdamW


@dataclass(frozen=True)
class Trained:
    """updates (C, n) = x - y; losses (C,): of the first batch, before any step."""

    updates: Tensor
    losses: Tensor


def train_one_by_one(
    network: Network,
    start: Tensor,
    batches: Batches,
    images: Tensor,
    labels: Tensor,
    settings: LocalConfig,
    correction: Tensor | None = None,
    adversary: Adversary | None = None,
) -> Trained:
    """`train`, a client after the other."""
    begin = start.expand(len(batches.rows), -1)
    alone = [
        train(
            network,
            begin[i : i + 1],
            batches.of(i),
            images,
            labels,
            settings,
            correction[i : i + 1] if correction is not None else None,
            adversary.of(i) if adversary is not None else None,
        )
        for i in range(len(begin))
    ]
    return Trained(torch.cat([one.updates for one in alone]), torch.cat([one.losses for one in alone]))


@torch.no_grad()
def train(
    network: Network,
    start: Tensor,
    batches: Batches,
    images: Tensor,
    labels: Tensor,
    settings: LocalConfig,
    correction: Tensor | None = None,
    adversary: Adversary | None = None,
) -> Trained:
    """start (n,), or (C, n) if clients start apart; images (rows, channels, height, width) as `pixels` takes them.

    labels (rows,). correction (C, n): c - c_i of SCAFFOLD. adversary: moves the images before every step.
    """
    num_clients, num_steps, _ = batches.rows.shape
    begin = start.expand(num_clients, -1)
    x = network.spec.stacked(begin)
    y = [one.clone(memory_format=torch.contiguous_format) for one in x]
    added = network.spec.stacked(correction) if correction is not None else None
    rule = _Rule(settings)
    losses = begin.new_zeros(num_clients)
    is_full = batches.is_full
    for step in range(num_steps):
        rows = batches.rows[:, step]
        inputs, targets = pixels(images, rows), labels[rows]
        if adversary is not None:
            inputs = adversary(y, inputs, targets, step)
        g, loss = network.gradients(y, inputs, targets, batches.weights[:, step])
        losses = loss if step == 0 else losses
        if settings.proximal:
            torch._foreach_add_(g, torch._foreach_sub(y, x), alpha=settings.proximal)
        if added is not None:
            torch._foreach_add_(g, added)
        moves = rule(y, g)
        if not is_full:
            active = (batches.steps > step).to(torch.float32)
            torch._foreach_mul_(moves, [active.view(-1, *[1] * (move.dim() - 1)) for move in moves])
        torch._foreach_add_(y, moves, alpha=-settings.rate)
    return Trained(begin - network.spec.vectors(y), losses)


def pixels(images: Tensor, rows: Tensor) -> Tensor:
    """images (all rows, ...) uint8 or float in [0, 1], at rows (C, B): (C, B, ...) float in [0, 1]."""
    found = images.index_select(0, rows.reshape(-1)).view(*rows.shape, *images.shape[1:])
    return found if found.is_floating_point() else found.float().div_(255)


EXECUTORS = {"batched": train, "serial": train_one_by_one}


class _Rule:
    """(parameters, gradients) -> what to subtract, in units of the rate. Uses up the gradients."""

    def __init__(self, settings: LocalConfig) -> None:
        self.settings = settings
        self.first: Stacked = []
        self.second: Stacked = []
        self.step = 0

    def __call__(self, y: Stacked, g: Stacked) -> Stacked:
        return self._adamw(y, g) if self.settings.optimizer == "adamw" else self._sgd(y, g)

    def _sgd(self, y: Stacked, g: Stacked) -> Stacked:
        settings = self.settings
        if settings.weight_decay:
            torch._foreach_add_(g, y, alpha=settings.weight_decay)
        if settings.momentum:
            if self.first:
                torch._foreach_mul_(self.first, settings.momentum)
                torch._foreach_add_(self.first, g)
            else:
                self.first = [one.clone() for one in g]
            return [one.clone() for one in self.first]
        return g

    def _adamw(self, y: Stacked, g: Stacked) -> Stacked:
        settings = self.settings
        self.step += 1
        self.first = self.first or [torch.zeros_like(one) for one in g]
        self.second = self.second or [torch.zeros_like(one) for one in g]
        torch._foreach_lerp_(self.first, g, 1 - BETA1)
        torch._foreach_mul_(self.second, BETA2)
        torch._foreach_addcmul_(self.second, g, g, 1 - BETA2)
        root = torch._foreach_sqrt(self.second)
        torch._foreach_div_(root, (1 - BETA2**self.step) ** 0.5)
        torch._foreach_add_(root, EPSILON)
        moves = list(torch._foreach_div(self.first, root))
        torch._foreach_div_(moves, 1 - BETA1**self.step)
        if settings.weight_decay:
            torch._foreach_add_(moves, y, alpha=settings.weight_decay)
        return moves
