"""Local adversarial training: every client trains on adversarial examples against its own model of the moment.

The attacks are those of distrobust.adversarial, on all clients' batches at once: their loss is a sum over images, so an
image's gradient depends on its own client's parameters alone. Random starts are functions of (seed, round, client,
step), as all randomness of a client.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from distrobust.adversarial import Attack, Threat
from distrobust.federated import draws
from distrobust.federated.draws import Integers, Purpose
from distrobust.federated.network import Network, Stacked
from distrobust.federated.settings import LocalAttackConfig


class _Cohort(nn.Module):
    """(C x B, ...) images -> (C x B, classes) logits, each by the parameters of its client."""

    def __init__(self, network: Network, parameters: Stacked) -> None:
        super().__init__()
        self._network, self._stacked = network, parameters

    def forward(self, x: Tensor) -> Tensor:
        num_clients = len(self._stacked[0])
        return self._network.logits(self._stacked, x.unflatten(0, (num_clients, -1))).flatten(0, 1)


@dataclass(frozen=True)
class Adversary:
    """Makes the examples of `clients` (C,) in one round."""

    network: Network
    settings: LocalAttackConfig
    seed: int
    round_number: int
    clients: Integers

    def of(self, client: int) -> Adversary:
        """That of one client of the cohort, as a cohort of one."""
        return replace(self, clients=self.clients[client : client + 1])

    def __call__(self, parameters: Stacked, x: Tensor, y: Tensor, step: int) -> Tensor:
        """x (C, B, ...) in [0, 1], y (C, B): x' of the same shape."""
        settings, flat = self.settings, x.flatten(0, 1)
        start = None
        if settings.name == "pgd":
            places = np.arange(x[0].numel())
            noise = draws.uniform(
                self.seed, Purpose.ATTACK, self.round_number, self.clients[:, None], step, places[None]
            )
            moved = torch.from_numpy((2 * noise - 1).astype(np.float32)).view_as(flat) * settings.eps
            start = (flat + moved).clamp(0, 1)
        model = _Cohort(self.network, [one.detach() for one in parameters])
        return attack_of(settings)(model, flat, y.flatten(), threat_of(settings), start=start).view_as(x)


def attack_of(settings: LocalAttackConfig) -> Attack:
    """As it is used in training."""
    return Attack(settings.name, steps=settings.steps)


def threat_of(settings: LocalAttackConfig) -> Threat:
    return Threat("linf", settings.eps)
