"""Random numbers as a pure function of counters such as (seed, purpose, round, client, step).

Nothing is drawn from a stream, so what a client gets depends neither on the order of the clients nor on how many there
are, and a million registered clients cost nothing until one of them is asked for. The mixing function is the finaliser
of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), once a counter.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """Separates the random numbers of different uses under one seed."""

    PARTITION = 1
    SELECTION = 2
    BATCHES = 3
    AVAILABILITY = 4
    DOWNLOAD = 5
    UPLOAD = 6
    LATENCY = 7
    COMPUTE = 8
    DROP_OUT = 9
    DROP_POINT = 10
    PHASE = 11
    ATTACK = 12
    PERSONAL = 13
    PROJECTION = 14
    SAMPLE = 15


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, purpose: Purpose, *counters: ArrayLike) -> Floats:
    """Float64 in [0, 1), of the shape the non-negative integer counters broadcast to."""
    with np.errstate(over="ignore"):  # modulo 2^64 on purpose
        state = _mixed(np.atleast_1d(np.asarray([seed], dtype=np.uint64)) + _GAMMA * np.uint64(purpose))
        for counter in counters:
            state = _mixed((state ^ _mixed(np.asarray(counter, dtype=np.uint64) + _GAMMA)) + _GAMMA)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(seed: int, purpose: Purpose, *counters: ArrayLike) -> Floats:
    """Standard normal float64, as `uniform`."""
    drawn = uniform(seed, purpose, *counters)
    values: Floats = torch.special.ndtri(torch.from_numpy(drawn * (1 - 2.0**-52) + 2.0**-54)).numpy()
    return values


def generator(seed: int, purpose: Purpose, client: int) -> np.random.Generator:
    """Where a distribution is wanted that has no simple inverse: numpy's, from the counters alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, int(purpose), client))))
