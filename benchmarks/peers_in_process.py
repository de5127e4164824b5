"""Peers of the accuracy benchmark: what others do to send fewer bytes, for N workers inside one process.

`fp16`: all-reduce of 16-bit gradients. `powersgd`: rank-r approximation with error feedback and momentum after the mean
(Vogels, Karimireddy and Jaggi, NeurIPS 2019, algorithms 1 and 2; one power iteration, warm start). `local`: every
worker takes `every` steps of SGD with momentum by itself, then parameters and momentum are averaged in 16 bits (Stich,
ICLR 2019). Bytes are a ring all-reduce's of what is sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distrobust.comm.transport import reduce_bytes
from distrobust.compression.memory import Rule


def make(net: nn.Module, num_workers: int, num_steps: int, rule: Rule, *, peer: str, **options: Any) -> Peer:
    return PEERS[peer](net, num_workers, num_steps, rule, **options)


class Peer(ABC):
    """The interface of workers.Workers."""

    def __init__(self, net: nn.Module, num_workers: int, num_steps: int, rule: Rule) -> None:
        self.net, self.num_workers, self.num_steps, self.rule = net, num_workers, num_steps, rule
        self.parameters = list(net.parameters())
        self.n = sum(p.numel() for p in self.parameters)
        self.buffers = [[b.clone() for b in net.buffers()] for _ in range(num_workers)]
        self.steps = 0
        self.sent_bytes = 0

    @abstractmethod
    def step(self, backward: Callable[[int], None], rate: float, _: Any = None) -> None: ...

    def gradient(self, backward: Callable[[int], None], rank: int) -> list[Tensor]:
        """Of worker `rank`, with weight decay."""
        torch._foreach_copy_(list(self.net.buffers()), self.buffers[rank])
        self.net.zero_grad(set_to_none=True)
        backward(rank)
        self.buffers[rank] = [b.clone() for b in self.net.buffers()]
        return [p.grad + self.rule.weight_decay * p.detach() for p in self.parameters if p.grad is not None]

    def average_buffers(self) -> None:
        for buffer, *others in zip(self.net.buffers(), *self.buffers, strict=True):
            if buffer.is_floating_point():
                buffer.copy_(torch.stack(others).mean(dim=0))

    def bytes(self) -> dict[str, Any]:
        dense = self.steps * reduce_bytes(4 * self.n, self.num_workers)
        return {"sent_bytes": self.sent_bytes, "dense_bytes": dense, "density": 1.0}


class Exchanging(Peer):
    """Those that turn the workers' gradients into one in every step, and apply momentum to that."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.momentum = [torch.zeros_like(p) for p in self.parameters]

    @abstractmethod
    def exchange(self, gradients: list[list[Tensor]]) -> list[Tensor]: ...

    def step(self, backward: Callable[[int], None], rate: float, _: Any = None) -> None:
        gradients = [self.gradient(backward, rank) for rank in range(self.num_workers)]
        mean = self.exchange(gradients)
        with torch.no_grad():
            torch._foreach_mul_(self.momentum, self.rule.momentum)
            torch._foreach_add_(self.momentum, mean)
            torch._foreach_add_(self.parameters, self.momentum, alpha=-rate)
        self.steps += 1


class Half(Exchanging):
    def exchange(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        self.sent_bytes += reduce_bytes(2 * self.n, self.num_workers)
        shares = [[(g / self.num_workers).half() for g in own] for own in gradients]
        return [torch.stack(same).sum(dim=0).float() for same in zip(*shares, strict=True)]


class PowerSGD(Exchanging):
    def __init__(self, *arguments: Any, rank: int) -> None:
        super().__init__(*arguments)
        self.rank = rank
        self.errors = [[torch.zeros_like(p) for p in self.parameters] for _ in range(self.num_workers)]
        generator = torch.Generator().manual_seed(0)
        self.queries = [
            torch.randn(p[0].numel(), rank, generator=generator) if p.dim() > 1 else None for p in self.parameters
        ]

    def exchange(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        means, num_floats = [], 0
        for i, query in enumerate(self.queries):
            if query is None:
                means.append(torch.stack([own[i] for own in gradients]).mean(dim=0))
                num_floats += means[-1].numel()
                continue
            shape = self.parameters[i].shape
            inputs = [
                (own[i] + error[i]).reshape(shape[0], -1) for own, error in zip(gradients, self.errors, strict=True)
            ]
            left = torch.linalg.qr(torch.stack([m @ query for m in inputs]).mean(dim=0)).Q
            right = torch.stack([m.T @ left for m in inputs]).mean(dim=0)
            self.queries[i] = right
            num_floats += left.numel() + right.numel()
            approximation = left @ right.T
            means.append(approximation.view(shape))
            for error, m in zip(self.errors, inputs, strict=True):
                error[i] = (m - approximation).view(shape)
        self.sent_bytes += reduce_bytes(4 * num_floats, self.num_workers)
        return means


class Local(Peer):
    def __init__(self, *arguments: Any, every: int) -> None:
        super().__init__(*arguments)
        self.every = every
        self.own = [
            ([p.detach().clone() for p in self.parameters], [torch.zeros_like(p) for p in self.parameters])
            for _ in range(self.num_workers)
        ]

    @torch.no_grad()
    def step(self, backward: Callable[[int], None], rate: float, _: Any = None) -> None:
        for rank, (weights, momentum) in enumerate(self.own):
            torch._foreach_copy_(self.parameters, weights)
            with torch.enable_grad():
                gradient = self.gradient(backward, rank)
            torch._foreach_mul_(momentum, self.rule.momentum)
            torch._foreach_add_(momentum, gradient)
            torch._foreach_add_(weights, momentum, alpha=-rate)
        self.steps += 1
        if self.steps % self.every == 0 or self.steps == self.num_steps:
            self.sent_bytes += reduce_bytes(2 * 2 * self.n, self.num_workers)
            for kind in (0, 1):
                for same in zip(*(own[kind] for own in self.own), strict=True):
                    mean = torch.stack(same).mean(dim=0)
                    for one in same:
                        one.copy_(mean)
        torch._foreach_copy_(self.parameters, self.own[0][0])


PEERS: dict[str, type[Peer]] = {"fp16": Half, "powersgd": PowerSGD, "local": Local}
