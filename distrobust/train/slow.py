"""Which rank holds the others up.

All ranks' steps take the same time, because each waits for the slowest. What tells them apart is a rank's own part of a
step: from its beginning until the rank has handed over its last message.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

LEAST_S = 0.05
"""Differences below this are noise of the host."""


def slow_ranks(own_s: Sequence[float], ratio: float) -> dict[int, str]:
    """Ranks whose own part of a step, in seconds, is more than `ratio` times the median of the others: what to say."""
    found = {}
    for rank, seconds in enumerate(own_s):
        others = [other for place, other in enumerate(own_s) if place != rank]
        if not others:
            return {}
        usual = statistics.median(others)
        if seconds > max(ratio * usual, usual + LEAST_S):
            found[rank] = f"rank {rank} takes {seconds:.2f} s for its own part of a step, the others {usual:.2f} s"
    return found
