"""What the server does with the mean update, taken as a gradient (Reddi et al., ICLR 2021, algorithms 1 and 2).

Letters: D mean of the clients' updates x - y, m and v moments, tau adaptivity, eta the server's rate.

    average     x <- x - eta D                                         FedAvg at eta 1
    momentum    m <- beta m + D;  x <- x - eta m                       FedAvgM (Hsu et al., 2019); Nesterov: D + beta m
    adam        m <- beta m + (1 - beta) D;  v <- beta2 v + (1 - beta2) D^2;  x <- x - eta m / (sqrt(v) + tau)

Differences from the paper: its D has the opposite sign; v begins at 0 where it has tau^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distrobust.federated.settings import ServerConfig


class Server:
    """The global model x (n,) float32 and the optimizer's moments."""

    def __init__(self, x: Tensor, settings: ServerConfig) -> None:
        self.settings = settings
        self.x = x
        self.m, self.v = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, mean: Tensor) -> Tensor:
        """Takes the mean update (n,); returns what was subtracted from x."""
        settings = self.settings
        if settings.optimizer == "average":
            move = settings.rate * mean
        elif settings.optimizer == "momentum":
            self.m = settings.momentum * self.m + mean
            move = settings.rate * (mean + settings.momentum * self.m if settings.nesterov else self.m)
        else:
            self.m = settings.momentum * self.m + (1 - settings.momentum) * mean
            self.v = settings.beta2 * self.v + (1 - settings.beta2) * mean.square()
            move = settings.rate * self.m / (self.v.sqrt() + settings.tau)
        self.x = self.x - move
        return move


class WeightedMean:
    """A sum in float64, in the order of the clients, so that cohorts of any size give the same."""

    def __init__(self, n: int) -> None:
        self._sum = torch.zeros(n, dtype=torch.float64)
        self._weight = 0.0

    def add(self, places: Tensor | None, values: Tensor, weight: float, discount: float = 1.0) -> None:
        """values (n,), or (k,) at `places` (k,). A discount makes the update smaller, not its weight."""
        if places is None:
            self._sum.add_(values.double(), alpha=weight * discount)
        else:
            self._sum.index_add_(0, places, values.double(), alpha=weight * discount)
        self._weight += weight

    def value(self) -> Tensor:
        """(n,) float32; zeros if nothing was added."""
        return (self._sum / self._weight if self._weight else self._sum).to(torch.float32)


def weights_of(num_rows: Sequence[int], settings: ServerConfig) -> list[float]:
    """Of each client in the mean."""
    return [float(rows) if settings.weights == "samples" else 1.0 for rows in num_rows]
