"""Bytes and memory of every exchange."""

import pytest
from harness.replicas import World, random_gradients

from distrobust.comm.exchange import EXCHANGES
from distrobust.compression import codec
from distrobust.compression.codec import VALUE_CODES, Code, Space

# ---- bytes ----


def test_what_sharded_sends_does_not_grow_with_the_ranks() -> None:
    """2 (N - 1) / N k coordinates, against (N - 1) k of all_gather; and N heads of 6 bytes with scales and fillings,
    40.
    """
    n, density = 40_000, 0.05
    payload = codec.num_bytes(Space(n, (2000,)), Code(VALUE_CODES["fp16"]))
    for num_ranks in (2, 3, 4, 8):
        sent = {}
        for exchange in EXCHANGES:
            world = World(num_ranks, 1, {"a": n}, exchange=exchange, values="fp16", density=density)
            world.step(random_gradients({"a": n}, num_ranks, 0), [["a"]])
            sent[exchange] = world.replicas[0].state.sent_bytes
        share = (num_ranks - 1) / num_ranks
        assert sent["sharded"] <= 2 * share * payload * 1.01 + 2 * num_ranks * 46
        assert sent["sharded"] >= 2 * share * payload * 0.95
        assert abs(sent["all_gather"] - (num_ranks - 1) * payload) <= (num_ranks - 1) * 46


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_machine_of_two_sends_half_from_each_rank(exchange: str) -> None:
    sizes = {"a": 40_000}
    sent = {}
    for num_local in (1, 2):
        world = World(2, num_local, sizes, exchange=exchange, values="fp16", density=0.05)
        world.step(random_gradients(sizes, 2 * num_local, 0), [["a"]])
        sent[num_local] = world.replicas[0].state.sent_bytes
    assert abs(2 * sent[2] - sent[1]) <= 0.05 * sent[1]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_residuals_of_a_machine_of_two_take_half_the_memory(exchange: str) -> None:
    replica = World(2, 2, {"a": 1001, "b": 1}, exchange=exchange).replicas[3]
    assert [r.v.numel() for r in replica.state.residuals.values()] == [501, 1]
