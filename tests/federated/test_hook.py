"""A simulated client's message is, bit for bit, what the communication hook sends for the same gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.replicas import Replica, random_gradients
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import distrobust
from distrobust import models
from distrobust.comm.together import in_process
from distrobust.comm.transport import Request, Transport
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES
from distrobust.compression.memory import Rule
from distrobust.federated.coding import Coder, compress
from distrobust.federated.network import flat
from distrobust.federated.settings import UploadConfig

SIZES = {"a": 3000, "b": 50, "c": 2500, "d": 700}


def listen(transport: Transport, heard: list[Tensor]) -> None:
    """Every tensor that is handed to the transport goes into `heard` too."""
    issue = transport.issue

    def listening(request: Request) -> Any:
        heard.append(request.tensor.clone())  # type: ignore[union-attr]
        return issue(request)

    transport.issue = listening  # type: ignore[method-assign]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("indices", INDEX_CODES)
@pytest.mark.parametrize("values", VALUE_CODES)
def test_messages_and_residuals_are_the_hooks_over_several_rounds(values: str, indices: str, momentum: float) -> None:
    (transport,) = in_process(1, 1)
    heard: list[Tensor] = []
    listen(transport, heard)
    rule = Rule(momentum=momentum)
    hook = Replica(transport, SIZES, density=0.03, rule=rule, values=values, indices=indices, fuse_below=1000)
    coder = Coder(list(SIZES.values()), UploadConfig(density=0.03, values=values, indices=indices, fuse_below=1000))
    v = torch.zeros(1, coder.n)
    u = torch.zeros(1, coder.n) if momentum else None
    for step in range(4):
        (gradients,) = random_gradients(SIZES, 1, seed=3, step=step)
        means = hook.step(gradients, [list(SIZES)])
        ours = compress(coder, rule, torch.cat(list(gradients.values()))[None], v, u, step)
        (coded,) = ours.coded
        assert coded is not None
        assert torch.equal(coded.message, heard[-1].view(-1))
        received = torch.zeros(coder.n)
        places, sent = coder.decode(coded.message, step)
        received[places] = sent
        assert torch.equal(received, torch.cat(list(means.values())))
        v, u = ours.v, ours.u
        assert torch.equal(v[0], torch.cat([hook.state.residuals[name].v for name in SIZES]))
        if u is not None:
            assert torch.equal(u[0], torch.cat([hook.state.residuals[name].u for name in SIZES]))


@pytest.mark.ranks
def test_message_is_that_of_the_real_hook_under_ddp() -> None:
    def body(rank: Rank) -> None:
        net = models.build("mlp", 10, (1, 8, 8), [0.5], [0.25], seed=1)
        ddp = DistributedDataParallel(net, process_group=rank.group)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        heard: list[Tensor] = []
        transport = Transport(rank.group)
        listen(transport, heard)
        distrobust.compress(ddp, optimizer, density=0.05, num_steps=10, warmup=0.0, values="4bit", transport=transport)
        x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
        parameters = list(net.parameters())
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(net(x), y), parameters)
        torch.nn.functional.cross_entropy(ddp(x), y).backward()
        coder = Coder([p.numel() for p in parameters], UploadConfig(density=0.05, values="4bit"))
        update = torch.cat([g.view(-1) for g in gradients])[None]
        assert update.shape[1] == len(flat(net))
        (coded,) = compress(coder, Rule(momentum=0.0), update, torch.zeros_like(update), None, 0).coded
        assert coded is not None
        assert [coded.message.tolist()] == [one.view(-1).tolist() for one in heard]

    run_ranks(1, body)
