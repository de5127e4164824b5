"""Ranks that are fed with gradients bucket by bucket, without a model or a backward: exchanges by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.futures import Future
from torch.nn import Parameter

from distrobust.comm.bucket import Settings
from distrobust.comm.state import Compression
from distrobust.comm.together import in_process
from distrobust.comm.transport import Transport
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES, Code
from distrobust.compression.density import Schedule
from distrobust.compression.memory import Rule

Gradients = dict[str, Tensor]
Buckets = Sequence[Sequence[str]]


class Replica:
    """One rank. `density` is what is sent, also where a dense all-reduce would be smaller; change it between steps."""

    def __init__(
        self,
        transport: Transport,
        sizes: dict[str, int],
        *,
        density: float = 0.1,
        rule: Rule | dict[str, Rule] | None = None,
        values: str = "fp32",
        indices: str = "elias_fano",
        exchange: str = "all_gather",
        selector: str = "sampled",
        fuse_below: int = 0,
        detect_unused: bool = False,
        observer: Any = None,
    ) -> None:
        self.density = density
        self.sizes = sizes
        rule = rule or Rule(momentum=0.0)
        rules = rule if isinstance(rule, dict) else dict.fromkeys(sizes, rule)
        code = Code(VALUE_CODES[values], INDEX_CODES[indices])
        settings = Settings(transport, code, selector, detect_unused, observer, exchange)
        self.parameters = {name: Parameter(torch.zeros(n)) for name, n in sizes.items()}
        self.state = Compression(self.parameters, rules, settings, Schedule(density), fuse_below=fuse_below)
        self.state.density_at = lambda _: self.density  # type: ignore[method-assign]

    def feed(self, names: Sequence[str], gradients: Gradients, is_first: bool, is_last: bool) -> Future[Any]:
        """One bucket."""
        flat = torch.cat([gradients[name].clone() for name in names])
        parts, start = [], 0
        for name in names:
            end = start + self.sizes[name]
            parts.append(self.state.part(self.parameters[name], start, flat[start:end]))
            start = end
        return self.state.reduce(flat, parts, is_first=is_first, is_last=is_last)

    def start(self, gradients: Gradients, buckets: Buckets) -> list[Future[Any]]:
        last = len(buckets) - 1
        return [self.feed(names, gradients, i == 0, i == last) for i, names in enumerate(buckets)]

    def finish(self, futures: list[Future[Any]], buckets: Buckets) -> Gradients:
        """The means by name. Raises what went wrong, with its own type."""
        try:
            flats = [future.wait() for future in futures]
        except RuntimeError:
            self.state.raise_cause()
            raise
        means = {}
        for names, flat in zip(buckets, flats, strict=True):
            pieces = flat.split([self.sizes[name] for name in names])
            means.update(zip(names, pieces, strict=True))
        return means

    def step(self, gradients: Gradients, buckets: Buckets) -> Gradients:
        return self.finish(self.start(gradients, buckets), buckets)


class World:
    """`num_machines` x `num_local` replicas on one thread, machine by machine."""

    def __init__(self, num_machines: int, num_local: int, sizes: dict[str, int], **options: Any) -> None:
        self.num_machines, self.num_local, self.sizes = num_machines, num_local, sizes
        self.transports = in_process(num_machines, num_local)
        self.replicas = [Replica(transport, sizes, **options) for transport in self.transports]

    def start(self, gradients: Sequence[Gradients], buckets: Buckets) -> list[list[Future[Any]]]:
        """Every bucket on every replica; returns each replica's futures."""
        futures: list[list[Future[Any]]] = [[] for _ in self.replicas]
        for i, names in enumerate(buckets):
            for replica, own, made in zip(self.replicas, gradients, futures, strict=True):
                made.append(replica.feed(names, own, i == 0, i == len(buckets) - 1))
        return futures

    def step(self, gradients: Sequence[Gradients], buckets: Buckets) -> list[Gradients]:
        """Each replica's means."""
        futures = self.start(gradients, buckets)
        return [r.finish(made, buckets) for r, made in zip(self.replicas, futures, strict=True)]

    def set_density(self, density: float) -> None:
        for replica in self.replicas:
            replica.density = density

    def of_machine(self, machine: int, name: str, kind: str = "v") -> Tensor:
        """(n,) float64: u or v of one machine, put together from what its ranks own."""
        own = self.replicas[machine * self.num_local : (machine + 1) * self.num_local]
        pieces = [getattr(replica.state.residuals[name], kind) for replica in own]
        return torch.cat(pieces)[: self.sizes[name]].double()

    def kept(self, name: str) -> Tensor:
        """(n,) float64: the sum of all machines' v."""
        return torch.stack([self.of_machine(m, name) for m in range(self.num_machines)]).sum(0)

    def snapshot(self) -> list[dict[str, Any]]:
        """A copy of every replica's u, v and whether they are settled."""
        return [
            {name: (r.u.clone(), r.v.clone(), r.settled) for name, r in replica.state.residuals.items()}
            for replica in self.replicas
        ]


def unchanged(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    """Whether two snapshots agree to the bit."""
    return all(
        torch.equal(a[name][0], b[name][0]) and torch.equal(a[name][1], b[name][1]) and a[name][2] == b[name][2]
        for a, b in zip(before, after, strict=True)
        for name in a
    )


def random_gradients(sizes: dict[str, int], num: int, seed: int, step: int = 0) -> list[Gradients]:
    """For each of `num` replicas; heavy-tailed, and another scale for every parameter."""
    rng = np.random.default_rng([seed, step])
    return [
        {
            name: torch.from_numpy((rng.standard_normal(n) ** 3 * 3.0 ** (i % 4)).astype(np.float32))
            for i, (name, n) in enumerate(sizes.items())
        }
        for _ in range(num)
    ]
