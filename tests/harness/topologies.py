"""Exchanges between ranks and machines that the contracts go through, and a network of small and large parameters."""

from dataclasses import dataclass
from typing import Any

import pytest
from harness.replicas import World

from distrobust.comm.exchange import EXCHANGES


@dataclass(frozen=True)
class Topology:
    """`exchange` between `machines`, each of `local` ranks; with one a machine it is the plain exchange."""

    exchange: str
    machines: int
    local: int = 1

    def __str__(self) -> str:
        return f"{self.exchange} {self.machines}x{self.local}"

    def world(self, sizes: dict[str, int], **options: Any) -> World:
        return World(self.machines, self.local, sizes, exchange=self.exchange, **options)

    @property
    def num_ranks(self) -> int:
        return self.machines * self.local


SHAPES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (3, 2), (2, 3)]
TOPOLOGIES = [Topology(name, *shape) for name in EXCHANGES for shape in SHAPES]
each_topology = pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
several = pytest.mark.parametrize(
    "topology", [Topology(name, *shape) for name in EXCHANGES for shape in [(2, 1), (3, 1), (2, 2), (3, 2)]], ids=str
)

MIXED = {"a": 1200, "b": 7, "c": 500, "d": 3, "e": 13}  # with fuse_below=20 b, d and e are selected together
ONE_EACH = [["e"], ["d"], ["c"], ["b"], ["a"]]  # the small ones alone in their buckets
TOGETHER = [["a", "b", "c", "d", "e"]]
SMALL_LAST = [["a"], ["c"], ["b", "d", "e"]]
