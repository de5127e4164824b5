"""A vector per client that lives as long as the simulation: residuals, velocities, control variates.

Only clients that have written one take room. What does not fit into memory lies in a memory-mapped file, which the
kernel writes back and drops from memory as it needs to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_BYTES = 16 * 2**20


class Rows:
    """client -> (n,) float32, zeros for one that never wrote. `file` is made when memory_limit_bytes are used up."""

    def __init__(self, n: int, memory_limit_bytes: int, file: Path) -> None:
        self.n, self.file = n, file
        self._rows_in_block = max(1, BLOCK_BYTES // (4 * n))
        self._in_memory = memory_limit_bytes // (4 * n * self._rows_in_block)
        self._blocks: list[NDArray[np.float32]] = []
        self._place: dict[int, int] = {}

    def __len__(self) -> int:
        """Clients that have written."""
        return len(self._place)

    @property
    def is_on_disk(self) -> bool:
        return len(self._blocks) > self._in_memory

    def read(self, clients: Sequence[int]) -> Tensor:
        """(C, n), a copy."""
        found = np.zeros((len(clients), self.n), dtype=np.float32)
        for row, client in zip(found, clients, strict=True):
            place = self._place.get(client)
            if place is not None:
                row[:] = self._row(place)
        return torch.from_numpy(found)

    def write(self, clients: Sequence[int], values: Tensor) -> None:
        """values (C, n)."""
        for client, row in zip(clients, values.numpy(), strict=True):
            place = self._place.setdefault(client, len(self._place))
            if place == len(self._blocks) * self._rows_in_block:
                self._blocks.append(self._new_block())
            self._row(place)[:] = row

    def state(self) -> dict[str, Any]:
        """Every client's number and vector, to be saved."""
        clients = sorted(self._place)
        return {"clients": clients, "values": self.read(clients)}

    def load(self, state: dict[str, Any]) -> None:
        """Into an empty one."""
        self.write(state["clients"], state["values"])

    def close(self) -> None:
        """Forgets everything and removes the file."""
        self._blocks.clear()
        self._place.clear()
        with contextlib.suppress(FileNotFoundError):
            self.file.unlink()

    def _row(self, place: int) -> NDArray[np.float32]:
        block, row = divmod(place, self._rows_in_block)
        found: NDArray[np.float32] = self._blocks[block][row]
        return found

    def _new_block(self) -> NDArray[np.float32]:
        shape = (self._rows_in_block, self.n)
        number = len(self._blocks) - self._in_memory
        if number < 0:
            return np.zeros(shape, dtype=np.float32)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        size = 4 * self.n * self._rows_in_block
        with self.file.open("wb" if number == 0 else "r+b") as file:
            file.truncate((number + 1) * size)  # a hole, which reads as zeros
        return np.memmap(self.file, np.float32, "r+", number * size, shape)
