"""N workers inside one process, training one model: what `torchrun --nproc-per-node N` would do, on one thread.

Each worker has its own share of the batch, batch-norm statistics and residual; messages are packed, counted and
unpacked as between machines (distrobust.comm.together). Parameters are shared, since all workers agree on them after
each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distrobust.comm.bucket import Observer, Settings
from distrobust.comm.flat import flat
from distrobust.comm.state import Compression
from distrobust.comm.together import in_process
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES, Code
from distrobust.compression.density import LADDER, Schedule, for_budget
from distrobust.compression.memory import Rule

Gradients = Callable[[int], None]  # worker r's share: leaves its gradient in the parameters' .grad


class Workers:
    """`step(backward)` runs backward(rank) for every rank and applies the mean as torch.optim.SGD would."""

    def __init__(
        self,
        net: nn.Module,
        num_workers: int,
        num_steps: int,
        rule: Rule,
        *,
        density: float | str = 1.0,
        fewer_bytes: float = 1.0,
        warmup: float = 0.0,
        final_steps: int = 0,
        final_density: float = 1.0,
        values: str = "fp16",
        indices: str = "elias_fano",
        exchange: str = "all_gather",
        step_ahead: bool = False,
        share: float | None = None,
        residual: bool = True,
        fuse_below: int = 2048,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.net = net
        self.parameters = dict(net.named_parameters())
        self.rate = 0.0
        self.residual = residual
        first = 1e-6 if density == "auto" else float(density)
        schedule = Schedule(first, round(warmup * num_steps), LADDER, num_steps, final_steps, final_density)
        code = Code(VALUE_CODES[values], INDEX_CODES[indices])

        def rates() -> dict[str, float]:
            return dict.fromkeys(self.parameters, self.rate)

        self.ranks = [
            Compression(
                self.parameters,
                dict.fromkeys(self.parameters, rule),
                Settings(transport, code, "sampled", False, observer, exchange),
                schedule,
                fuse_below=fuse_below,
                rates=rates if step_ahead else None,
            )
            for transport, observer in zip(in_process(num_workers), observers or [None] * num_workers, strict=True)
        ]
        if share is not None:  # c, how far to step ahead, other than comm/ahead.py chooses
            for one in self.ranks:
                assert one.ahead is not None
                one.ahead.share = share
        if density == "auto":
            first_rank = self.ranks[0]
            budget = num_steps * first_rank.step_bytes(1.0) / fewer_bytes
            schedule = for_budget(schedule, budget, first_rank.step_bytes)
            for one in self.ranks:
                one.density = schedule
        self.buffers = [[b.clone() for b in net.buffers()] for _ in range(num_workers)]
        self.buckets = [torch.zeros(sum(p.numel() for p in self.parameters.values())) for _ in range(num_workers)]

    def step(self, backward: Gradients, rate: float, momentum: list[Tensor] | None = None) -> None:
        """One optimizer step at a learning rate; `momentum`: buffers of an optimizer that has its own."""
        self.rate = rate
        self.exchange(backward)
        for i, (parameter, mean) in enumerate(zip(self.parameters.values(), self.means(), strict=True)):
            if momentum is not None:
                mean = flat(momentum[i]).mul_(0.9).add_(mean)
            flat(parameter.detach()).sub_(mean, alpha=rate)

    def step_with(self, optimizer: torch.optim.Optimizer, backward: Gradients) -> None:
        """One step of an optimizer on the mean gradient."""
        self.exchange(backward)
        for parameter, mean in zip(self.parameters.values(), self.means(), strict=True):
            parameter.grad = torch.empty_like(parameter)
            flat(parameter.grad).copy_(mean)
        optimizer.step()

    def means(self) -> list[Tensor]:
        """What every worker was given for each parameter, flat."""
        return list(self.buckets[0].split([p.numel() for p in self.parameters.values()]))

    def exchange(self, backward: Gradients) -> None:
        """Runs backward(rank) for every rank and leaves the mean in all buckets."""
        reduced = []
        for rank, compression in enumerate(self.ranks):
            for buffer, own in zip(self.net.buffers(), self.buffers[rank], strict=True):
                buffer.copy_(own)
            compression.step_ahead()
            self.net.zero_grad(set_to_none=True)
            backward(rank)
            self.buffers[rank] = [b.clone() for b in self.net.buffers()]
            bucket, parts, at = self.buckets[rank], [], 0
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                here = bucket[at : at + parameter.numel()]
                here.copy_(flat(parameter.grad))
                parts.append(compression.part(parameter, at, here))
                at += parameter.numel()
            reduced.append(compression.reduce(bucket, parts, is_first=True, is_last=True))
            compression.step_back()
        for future in reduced:
            future.wait()
        if not self.residual:
            for compression in self.ranks:
                for memory in compression.residuals.values():
                    memory.v.zero_()

    def own_share(self) -> float | None:
        """How much of a worker's residual is that of the mean: ||mean v||^2 / mean ||v_i||^2, between 1 / N and 1."""
        v = torch.stack([torch.cat([memory.v for memory in one.residuals.values()]) for one in self.ranks])
        kept = float(v.square().sum()) / len(v)
        return float(v.mean(dim=0).square().sum()) / kept if kept else None

    def average_buffers(self) -> None:
        """Batch-norm statistics, averaged over workers, into the model."""
        for buffer, *others in zip(self.net.buffers(), *self.buffers, strict=True):
            if buffer.is_floating_point():
                buffer.copy_(torch.stack(others).mean(dim=0))

    def bytes(self) -> dict[str, Any]:
        """Sent by worker 0 so far, and what dense fp32 would have sent."""
        first = self.ranks[0]
        return {"sent_bytes": first.sent_bytes, "dense_bytes": first.dense_bytes, "density": first.density.density}
