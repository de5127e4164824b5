"""What the server does with a mean update, against torch's SGD and Adam written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distrobust.federated.server import Server
from distrobust.federated.settings import ServerConfig


def start_and_means() -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    start, *means = torch.randn(6, 30, generator=generator)
    return start, means


@pytest.mark.parametrize(
    ("chosen", "theirs"),
    [
        ({"optimizer": "average"}, {}),
        ({"optimizer": "momentum", "momentum": 0.8}, {"momentum": 0.8}),
        ({"optimizer": "momentum", "momentum": 0.8, "nesterov": True}, {"momentum": 0.8, "nesterov": True}),
    ],
    ids=["average", "momentum", "nesterov"],
)
def test_average_and_momentum_are_torchs_sgd(chosen: dict[str, Any], theirs: dict[str, Any]) -> None:
    """With the mean update as the gradient."""
    start, means = start_and_means()
    server = Server(start, ServerConfig(rate=0.7, **chosen))
    parameter = start.clone().requires_grad_()
    sgd = torch.optim.SGD([parameter], lr=0.7, **theirs)
    for mean in means:
        before = server.x
        move = server.step(mean)
        assert torch.equal(server.x, before - move)
        parameter.grad = mean.clone()
        sgd.step()
        torch.testing.assert_close(server.x, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_adam_is_the_papers() -> None:
    """FedAdam (Reddi et al., 2021): tau outside the root, moments from 0 and not corrected for it."""
    start, means = start_and_means()
    server = Server(start, ServerConfig(optimizer="adam", rate=0.3, momentum=0.8, beta2=0.95, tau=0.05))
    x, m, v = start.double().numpy(), np.zeros(30), np.zeros(30)
    for mean in means:
        before = server.x
        move = server.step(mean)
        assert torch.equal(server.x, before - move)
        d = mean.double().numpy()
        m = 0.8 * m + 0.2 * d
        v = 0.95 * v + 0.05 * d**2
        x = x - 0.3 * m / (np.sqrt(v) + 0.05)
        np.testing.assert_allclose(server.x.numpy(), x, rtol=1e-5, atol=1e-5)
