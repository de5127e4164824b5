"""A model of its own for every client, from the global one (Cheng, Chadha, Duchi 2021, arXiv 2108.07313).

    FTFA    fine-tunes the final global model theta_0 on the client's rows
    RTFA    the same with + lambda ||theta - theta_0||^2 in the loss (no 1/2)

Both are compared with the global model on rows of the same clients that nobody trained on: a share of each client's,
set apart before the first round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrobust.federated import batches, draws, local
from distrobust.federated.draws import Integers, Purpose
from distrobust.federated.evaluation import histogram
from distrobust.federated.network import Network
from distrobust.federated.settings import LocalConfig, PersonalConfig


@dataclass(frozen=True)
class Personal:
    """Right answers on the clients' own test rows, by model: global, ftfa, rtfa.

    accuracies: over the rows of all clients together. histograms: clients by their accuracy, in BINS bins from 0 to 1.
    """

    clients: int
    rows: int
    accuracies: dict[str, float]
    histograms: dict[str, list[int]]


def set_apart(rows: Integers, client: int, share: float, seed: int) -> tuple[Integers, Integers]:
    """(train, test) rows of a client: `share` of them, at least one where it has two, is for testing."""
    order = rows[np.argsort(draws.uniform(seed, Purpose.PERSONAL, client, np.arange(len(rows))), kind="stable")]
    num_test = min(len(rows) - 1, max(1, round(share * len(rows))))
    return order[num_test:], order[:num_test]


def evaluate(
    network: Network,
    theta_0: Tensor,
    parts_of: Callable[[int], tuple[Integers, Integers]],
    num_clients: int,
    images: Tensor,
    labels: Tensor,
    settings: PersonalConfig,
    base: LocalConfig,
    cohort: int,
    seed: int,
) -> Personal:
    """parts_of(client): its train and test rows. Clients without test rows are left out."""
    tuned = base.model_copy(
        update={
            "epochs": settings.epochs,
            "steps": None,
            "rate": settings.rate or base.rate,
            "control_variates": False,
            "proximal": 0.0,
        }
    )
    regularised = tuned.model_copy(update={"proximal": 2 * settings.penalty})  # gradient of lambda ||.||^2
    methods = {"ftfa": tuned, "rtfa": regularised}
    right: dict[str, list[Integers]] = {name: [] for name in ("global", *methods)}
    sizes: list[int] = []
    for start in range(0, num_clients, cohort):
        numbers = np.arange(start, min(start + cohort, num_clients))
        parts = [parts_of(int(client)) for client in numbers]
        own = [i for i, (_, test) in enumerate(parts) if len(test)]
        if not own:
            continue
        tests = [parts[i][1] for i in own]
        plan_of = {
            name: _plan([parts[i][0] for i in own], numbers[own], method, seed) for name, method in methods.items()
        }
        right["global"].append(_right(network, theta_0.expand(len(own), -1), tests, images, labels))
        for name, method in methods.items():
            trained = local.train(network, theta_0, plan_of[name], images, labels, method)
            right[name].append(_right(network, theta_0 - trained.updates, tests, images, labels))
        sizes += [len(test) for test in tests]
    found = {name: np.concatenate(counts) if counts else np.zeros(0, np.int64) for name, counts in right.items()}
    return Personal(
        len(sizes),
        sum(sizes),
        {name: int(counts.sum()) / max(1, sum(sizes)) for name, counts in found.items()},
        {name: histogram(counts / np.array(sizes)) for name, counts in found.items()},
    )


def _plan(rows: Sequence[Integers], clients: Integers, settings: LocalConfig, seed: int) -> batches.Batches:
    return batches.make(rows, clients, settings, seed, AFTER)


AFTER = 2**31  # stands where rounds have their number: no simulation is that long


@torch.no_grad()
def _right(network: Network, vectors: Tensor, tests: Sequence[Integers], images: Tensor, labels: Tensor) -> Integers:
    """Of each client's test rows: how many its own vector (C, n) gets right, (C,)."""
    most = max(len(test) for test in tests)
    rows = torch.zeros((len(tests), most), dtype=torch.int64)
    real = torch.zeros((len(tests), most), dtype=torch.bool)
    for i, test in enumerate(tests):
        rows[i, : len(test)] = torch.from_numpy(test)
        real[i, : len(test)] = True
    logits = network.logits(network.spec.stacked(vectors), local.pixels(images, rows))
    right: Integers = ((logits.argmax(2) == labels[rows]) & real).sum(1).numpy()
    return right
