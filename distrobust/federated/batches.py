"""Which rows each client of a cohort takes in which local step: rectangular, with weights that blank the padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distrobust.federated import draws
from distrobust.federated.draws import Integers, Purpose
from distrobust.federated.settings import LocalConfig


@dataclass(frozen=True)
class Batches:
    """rows (C, S, B) int64; weights (C, S, B) float32: 1 / (rows in the batch), and 0 for padding.

    A client's steps come first and its padding last: `steps` (C,) says how many it has.
    """

    rows: Tensor
    weights: Tensor
    steps: Tensor

    def of(self, client: int) -> Batches:
        """Those of one client of the cohort, as a cohort of one."""
        steps = int(self.steps[client])
        chosen = slice(client, client + 1)
        return Batches(self.rows[chosen, :steps], self.weights[chosen, :steps], self.steps[chosen])

    @property
    def is_full(self) -> bool:
        """Whether every client takes every step."""
        return bool((self.steps == self.rows.shape[1]).all())


def num_steps(num_rows: int, settings: LocalConfig) -> int:
    """Local steps of a client in a round."""
    if settings.steps is not None:
        return settings.steps
    return settings.epochs * -(-num_rows // (settings.batch_size or num_rows))


def num_examples(num_rows: int, settings: LocalConfig) -> int:
    """Rows a client trains on in a round, each as often as it comes."""
    if settings.steps is None:
        return settings.epochs * num_rows
    size = settings.batch_size or num_rows
    each = -(-num_rows // size)
    full, rest = divmod(settings.steps, each)
    return full * num_rows + min(rest * size, num_rows)


def make(rows: Sequence[Integers], clients: Integers, settings: LocalConfig, seed: int, round_number: int) -> Batches:
    """rows[i]: those of clients[i]. Each epoch is a new order, a function of (seed, round, client, epoch)."""
    sizes = np.array([len(own) for own in rows])
    most = int(sizes.max())
    size = settings.batch_size or most
    each = -(-most // size)  # batches of the largest client in an epoch
    epochs = settings.epochs
    if settings.steps is not None:
        epochs = max(-(-settings.steps // -(-int(own) // size)) for own in sizes)
    padded = np.zeros((len(rows), each * size), dtype=np.int64)
    for i, own in enumerate(rows):
        padded[i, : len(own)] = own
    places = np.arange(each * size)
    keys = draws.uniform(
        seed, Purpose.BATCHES, round_number, clients[:, None, None], np.arange(epochs)[None, :, None], places
    )
    keys[np.broadcast_to((places >= sizes[:, None])[:, None], keys.shape)] = 2.0  # padding goes to the end
    order = np.argsort(keys, axis=2, kind="stable")
    shape = (len(rows), epochs * each, size)
    chosen = np.take_along_axis(np.broadcast_to(padded[:, None], keys.shape), order, axis=2).reshape(shape)
    real = np.take_along_axis(keys, order, axis=2).reshape(shape) < 2.0
    counts = real.sum(axis=2)
    if (counts == 0).any():  # batches of padding alone go behind all others
        front = np.argsort(counts == 0, axis=1, kind="stable")[:, :, None]
        chosen, real = np.take_along_axis(chosen, front, axis=1), np.take_along_axis(real, front, axis=1)
        counts = real.sum(axis=2)
    last = int((counts > 0).sum(axis=1).max()) if settings.steps is None else settings.steps
    chosen, real, counts = chosen[:, :last], real[:, :last], counts[:, :last]
    weights = real / np.maximum(counts, 1)[:, :, None]
    return Batches(
        torch.from_numpy(np.ascontiguousarray(chosen)),
        torch.from_numpy(weights.astype(np.float32)),
        torch.from_numpy((counts > 0).sum(axis=1)),
    )
