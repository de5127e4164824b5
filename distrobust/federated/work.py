"""What a cohort of clients does in a round, as a function of what it is given: train, compress, answer.

A worker keeps nothing between cohorts, so it does not matter which one does which, in this process or elsewhere:
answers are the same to the bit, and the simulation takes them in the order of the cohorts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distrobust.compression.memory import Rule
from distrobust.federated import batches, local, network
from distrobust.federated.attacked import Adversary
from distrobust.federated.coding import Coder, compress
from distrobust.federated.draws import Integers
from distrobust.federated.projected import projected
from distrobust.federated.settings import SimulateConfig


@dataclass(frozen=True)
class Task:
    """Clients (C,) with their rows, and where they begin: (n,), or (C, n) if clients start apart.

    correction (C, n): c - c_i of SCAFFOLD. v, u (C, n): what clients kept from earlier rounds, None if nothing is kept.
    """

    round_number: int
    clients: Integers
    rows: list[Integers]
    start: Tensor
    correction: Tensor | None
    v: Tensor | None
    u: Tensor | None


@dataclass(frozen=True)
class Answer:
    """What comes back from C clients: losses and local steps (C,), and the updates, as one of

    updates (C, n): dense, of which `counts` (C,) are finite; or
    messages: one of those that are, with what their clients keep in v, u (C, n).
    """

    counts: Tensor
    losses: Tensor
    steps: Tensor
    updates: Tensor | None = None
    messages: list[Tensor] | None = None
    v: Tensor | None = None
    u: Tensor | None = None


Workers = Callable[[Iterable[Task]], Iterator[Answer]]  # answers in the order of the tasks


class Worker:
    """images (rows, channels, height, width) and labels (rows,): of all clients."""

    def __init__(self, config: SimulateConfig, module: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.config, self.module, self.images, self.labels = config, module, images, labels
        self.network = network.network(module)
        if config.local.gradients == "target_projection":
            self.network = projected(module, self.network, config.run.seed)
        self.upload = Coder(self.network.spec.sizes, config.upload) if config.upload is not None else None

    def __call__(self, task: Task) -> Answer:
        config, seed = self.config, self.config.run.seed
        plan = batches.make(task.rows, task.clients, config.local, seed, task.round_number)
        adversary = None
        if config.attack is not None:
            adversary = Adversary(self.network, config.attack, seed, task.round_number, task.clients)
        # torch.func.vmap of cnn_gn takes 1.8 times as long on a CPU as one client after the other
        executor = "serial" if self.network.fallback else config.execute.executor
        trained = local.EXECUTORS[executor](
            self.network, task.start, plan, self.images, self.labels, config.local, task.correction, adversary
        )
        if self.upload is None or config.upload is None:
            counts = network.is_finite(trained.updates)
            return Answer(counts, trained.losses, plan.steps, trained.updates)
        rule = Rule(momentum=config.upload.momentum, masking=config.upload.masking)
        v = torch.zeros_like(trained.updates) if task.v is None else task.v
        sent = compress(self.upload, rule, trained.updates, v, task.u, task.round_number)
        counts = torch.tensor([one is not None for one in sent.coded], dtype=torch.bool)
        messages = [one.message for one in sent.coded if one is not None]
        kept = sent.v if task.v is not None else None
        return Answer(counts, trained.losses, plan.steps, messages=messages, v=kept, u=sent.u)

    def here(self, tasks: Iterable[Task]) -> Iterator[Answer]:
        """One after the other, in this process."""
        return map(self, tasks)
