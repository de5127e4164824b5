"""How good the model is that clients have: over all rows, and for one client and another.

A client's accuracy is that on rows of its own mix of classes: of the classes' accuracies, weighted by their shares
among its rows. That is what it would see on fresh rows if clients differ in their classes alone.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from distrobust.adversarial import Attack
from distrobust.evaluation import Score, count_correct, score
from distrobust.federated import draws
from distrobust.federated.attacked import threat_of
from distrobust.federated.dataset import Rows
from distrobust.federated.draws import Floats, Integers, Purpose
from distrobust.federated.network import load_
from distrobust.federated.partition import Partition
from distrobust.federated.settings import SimulateConfig

NATURAL, ROBUST = Attack("none"), Attack("pgd", steps=20)
SAMPLE = 1000  # clients whose accuracy is looked at
BINS = 50  # of histograms of accuracies
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def scores(config: SimulateConfig, module: nn.Module, vector: Tensor, rows: Rows) -> dict[str, Score]:
    """Of the module with parameters `vector` (n,): clean, and robust if clients train against an attack."""
    model = load_(module, vector)
    model.eval()
    size, seed = config.evaluate.batch_size, config.run.seed
    threat = threat_of(config.attack) if config.attack is not None else None
    against = {"clean": (NATURAL, None), **({"robust": (ROBUST, threat)} if threat is not None else {})}
    found = {}
    for name, (attack, ball) in against.items():
        pairs = zip(rows.images.split(size), rows.labels.split(size), strict=True)
        found[name] = score(count_correct(model, pairs, attack, ball, seed), attack, ball, seed)
    return found


def class_shares(partition: Partition, labels: Integers, num_classes: int, seed: int) -> Floats:
    """(clients, classes), rows adding up to 1: of all clients, or of SAMPLE of them."""
    registered = partition.num_clients
    chosen = np.arange(registered)
    if registered > SAMPLE:
        chosen = np.unique((draws.uniform(seed, Purpose.SAMPLE, np.arange(SAMPLE)) * registered).astype(np.int64))
    counts = np.stack([np.bincount(labels[partition.rows_of(c)], minlength=num_classes) for c in chosen.tolist()])
    return np.asarray(counts / counts.sum(1, keepdims=True), dtype=np.float64)


def of_clients(found: Score, shares: Floats) -> Floats:
    """(clients,) accuracies. Classes of which `found` saw no row are left out; NaN for clients with no other."""
    samples = np.zeros(shares.shape[1])
    right = np.zeros(shares.shape[1])
    samples[: len(found.class_samples)] = found.class_samples
    right[: len(found.class_correct)] = found.class_correct
    seen = samples > 0
    weights = shares[:, seen]
    with np.errstate(invalid="ignore"):
        return np.asarray((weights @ (right[seen] / samples[seen])) / weights.sum(1), dtype=np.float64)


def histogram(accuracies: Floats) -> list[int]:
    """Clients in each of BINS equal bins from 0 to 1."""
    counts: list[int] = np.histogram(accuracies[np.isfinite(accuracies)], bins=BINS, range=(0.0, 1.0))[0].tolist()
    return counts
