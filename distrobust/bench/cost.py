"""What a step costs, as formulas: processor, bytes, rounds of latency. Pure functions; nothing here is measured.

    seconds = local + sent / bandwidth + rounds * latency

With N workers, n parameters, m bytes in one worker's sparse message, L(N) the processor's seconds to prepare one and
decode N of them, S(N) those of two hops, both straight lines:

    exchange      bytes sent by each       rounds      local
    dense         2 (N-1)/N n bytes        2 (N-1)     that of a step without an exchange
    all_gather    (N-1) m                  N-1         L(N)
    sharded       2 (N-1)/N m              N           S(N): selects in N parts, decodes N parts twice, selects again

Both directions of a link carry as much, all workers send at once, and no link is shared. Local work and exchange are
added up: the overlap of one bucket's exchange with the next one's compression, which makes a step shorter, is left out,
and so is the slowest of N workers, which makes it longer. Where several buckets are exchanged one behind the other,
only the last one's rounds are counted: the others' pass while gradients are still being compressed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Local:
    """Seconds a step takes on a worker's processor: `fixed_s`, and `per_message_s` for every message it decodes."""

    fixed_s: float
    per_message_s: float = 0.0

    def decoding(self, num_messages: float) -> float:
        return self.fixed_s + num_messages * self.per_message_s

    def times(self, factor: float) -> Local:
        """On a processor that has `factor` times as much to do."""
        return Local(self.fixed_s * factor, self.per_message_s * factor)


def fit(seconds: dict[int, float]) -> Local:
    """The Local through two or more measurements, number of messages -> seconds (least squares, never below zero)."""
    mean_x = sum(seconds) / len(seconds)
    mean_y = sum(seconds.values()) / len(seconds)
    spread = sum((x - mean_x) ** 2 for x in seconds)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in seconds.items()) / spread if spread else 0.0
    slope = max(0.0, slope)
    return Local(max(0.0, mean_y - slope * mean_x), slope)


@dataclass(frozen=True)
class Cost:
    """One step by one exchange, on each of the workers."""

    exchange: str
    local_s: float
    sent_bytes: float
    rounds: int

    def seconds(self, bytes_per_s: float, latency_s: float) -> float:
        """On a link that carries `bytes_per_s` of payload each way and takes `latency_s` from end to end."""
        return self.local_s + self.sent_bytes / bytes_per_s + self.rounds * latency_s


def dense(num_workers: int, num_bytes: float, local: Local) -> Cost:
    """A ring all-reduce of `num_bytes`."""
    share = (num_workers - 1) / num_workers
    return Cost("dense", local.decoding(1), 2 * share * num_bytes, 2 * (num_workers - 1))


def all_gather(num_workers: int, message_bytes: float, local: Local) -> Cost:
    """Everybody's message to everybody, in a ring."""
    others = num_workers - 1
    return Cost("all_gather", local.decoding(num_workers), others * message_bytes, others)


def sharded(num_workers: int, message_bytes: float, local: Local) -> Cost:
    """Messages in parts to the parts' owners, all at once; then what the owners selected, to all, in a ring."""
    share = (num_workers - 1) / num_workers
    rounds = num_workers if num_workers > 1 else 0
    return Cost("sharded", local.decoding(num_workers), 2 * share * message_bytes, rounds)


def fastest(costs: Iterable[Cost], bytes_per_s: float, latency_s: float) -> Cost:
    return min(costs, key=lambda cost: cost.seconds(bytes_per_s, latency_s))


def crossover(sparse: Iterable[Cost], rival: Cost, latency_s: float) -> float:
    """Payload bytes per second below which the best of `sparse` is faster than `rival`: 0 never, inf always.

    Both are straight lines over 1 / bandwidth, so each pair meets once at most. A sparse exchange that sends more
    than its rival is never counted as faster.
    """
    return max((_crossover(cost, rival, latency_s) for cost in sparse), default=0.0)


def _crossover(sparse: Cost, rival: Cost, latency_s: float) -> float:
    fewer_bytes = rival.sent_bytes - sparse.sent_bytes
    if fewer_bytes <= 0:
        return 0.0
    more_s = (sparse.local_s + sparse.rounds * latency_s) - (rival.local_s + rival.rounds * latency_s)
    return fewer_bytes / more_s if more_s > 0 else math.inf
