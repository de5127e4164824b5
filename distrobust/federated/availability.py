"""Which clients can be reached, and which of those a round starts.

Whether a client is there is a function of (seed, round, client), also for the Markov chain: a draw of a round may send
every state to the same one, so looking back from a round to the latest such draw tells the state without a history
(coupling from the past, Propp and Wilson, 1996). With correlation `stay` that takes 1 / (1 - stay) rounds on average.
"""

from __future__ import annotations

import math

import numpy as np

from distrobust.federated import draws
from distrobust.federated.draws import Floats, Integers, Purpose
from distrobust.federated.partition import Partition
from distrobust.federated.settings import AvailabilityConfig

FEW = 1024  # registered clients, all of whom are looked at in every round
BLOCKS = 16  # of candidates that are tried before all registered clients are looked at


class Availability:
    def __init__(
        self, settings: AvailabilityConfig, seed: int, partition: Partition, labels: Integers, num_classes: int
    ) -> None:
        self._settings, self._seed, self._partition = settings, seed, partition
        self._labels, self.num_classes = labels, num_classes

    def select(self, wanted: int, round_number: int, clock_s: float) -> Integers:
        """Ascending numbers of up to `wanted` clients that can be reached, all sets of them being equally likely.

        Looks at about as many clients as are wanted, however many are registered, unless few can be reached.
        """
        registered = self._partition.num_clients
        if registered > FEW and wanted * 4 < registered:
            found = np.zeros(0, dtype=np.int64)
            for block in range(BLOCKS):
                places = np.arange(2 * wanted) + block * 2 * wanted
                drawn = draws.uniform(self._seed, Purpose.SELECTION, round_number, places)
                candidates = (drawn * registered).astype(np.int64)
                candidates = candidates[self.reachable(candidates, round_number, clock_s)]
                found = np.concatenate([found, candidates])
                _, first = np.unique(found, return_index=True)
                found = found[np.sort(first)]
                if len(found) >= wanted:
                    return np.sort(found[:wanted])
        everybody = np.arange(registered)
        keys = draws.uniform(self._seed, Purpose.SELECTION, round_number, everybody)
        there = everybody[self.reachable(everybody, round_number, clock_s)]
        return np.sort(there[np.argsort(keys[there], kind="stable")[:wanted]])

    def reachable(
        self, clients: Integers, round_number: int, clock_s: float
    ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """(C,) bool"""
        settings = self._settings
        if settings.name == "always":
            return np.ones(len(clients), dtype=np.bool_)
        if settings.name == "markov":
            return self._chain(clients, round_number)
        return self._draw(clients, round_number) < self._probability(clients, clock_s)

    def _probability(self, clients: Integers, clock_s: float) -> Floats:
        settings = self._settings
        if settings.name == "bernoulli":
            return np.full(len(clients), settings.share)
        if settings.name == "diurnal":
            phase = draws.uniform(self._seed, Purpose.PHASE, clients)
            wave = np.sin(2 * math.pi * (clock_s / settings.day_s + phase))
        else:
            means = [self._labels[self._partition.rows_of(client)].mean() for client in clients.tolist()]
            wave = 2 * np.array(means) / max(1, self.num_classes - 1) - 1
        return np.clip(settings.share * (1 + settings.strength * wave), 0.0, 1.0)

    def _draw(self, clients: Integers, round_number: int) -> Floats:
        return draws.uniform(self._seed, Purpose.AVAILABILITY, round_number, clients)

    def _chain(self, clients: Integers, round_number: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """With probability `stay` a client is as it was; otherwise it is there with probability `share`."""
        settings = self._settings
        state = np.zeros(len(clients), dtype=np.bool_)
        unknown = np.arange(len(clients))
        for earlier in range(round_number, -1, -1):
            drawn = self._draw(clients[unknown], earlier)
            renewed = (drawn >= settings.stay) | (earlier == 0)
            scaled = drawn if earlier == 0 else (drawn - settings.stay) / (1 - settings.stay)
            state[unknown[renewed]] = scaled[renewed] < settings.share
            unknown = unknown[~renewed]
            if not len(unknown):
                break
        return state
