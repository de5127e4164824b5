"""What every exchange does with a gradient that is not finite, and with a message that came damaged: nothing, aloud."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.replicas import Buckets, World, random_gradients, unchanged
from harness.topologies import MIXED, ONE_EACH, SMALL_LAST, TOGETHER, Topology, several
from torch import Tensor

from distrobust.comm.exchange import EXCHANGES
from distrobust.comm.together import InProcess
from distrobust.comm.transport import AllGather, AllToAll, Local, Request
from distrobust.compression.memory import Rule
from distrobust.errors import CodecError


@several
@pytest.mark.parametrize("buckets", [ONE_EACH, SMALL_LAST], ids=["one each", "small last"])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_a_gradient_that_is_not_finite_leaves_no_trace_on_any_rank(
    topology: Topology, buckets: Buckets, density: float
) -> None:
    """On every rank in turn, in every parameter, at its first or last place; sparse steps before, so that residuals are
    not zero, and one behind, which is that of a twin that never met it.
    """
    options = {"rule": Rule(0.5), "fuse_below": 20, "density": 0.05}
    world, twin = topology.world(MIXED, **options), topology.world(MIXED, **options)

    def both(step: int) -> None:
        gradients = random_gradients(MIXED, topology.num_ranks, 5, step)
        ours, theirs = world.step(gradients, buckets), twin.step(gradients, buckets)
        assert all(torch.equal(ours[0][name], theirs[0][name]) for name in MIXED)

    for step in range(2):
        both(step)
    for one in (world, twin):
        one.set_density(density)
    before = world.snapshot()
    for i, name in enumerate(MIXED):
        gradients = random_gradients(MIXED, topology.num_ranks, 6, i)
        rank = i % topology.num_ranks
        gradients[rank][name][-(i % 2)] = [math.nan, math.inf, -math.inf][i % 3]
        means = world.step(gradients, buckets)
        assert all(replica.state.skipped for replica in world.replicas)
        assert all(bool(torch.isnan(mean).all()) for one in means for mean in one.values())
        assert unchanged(before, world.snapshot())
        for replica in world.replicas:
            replica.state.step -= 1  # in messages
    both(2)
    assert not any(replica.state.skipped for replica in world.replicas)
    assert unchanged(world.snapshot(), twin.snapshot())


# ---- damage ----


class Damaging(InProcess):
    """Hands on what `damage` makes of a request."""

    damage: Callable[[Request], None] | None = None

    def issue(self, request: Request | Local) -> Any:
        if self.damage is not None and not isinstance(request, Local):
            self.damage(request)
        return super().issue(request)


def flip(tensor: Tensor) -> None:
    """One bit, in the checksum: the last bytes of a row may be its filling."""
    tensor.view(-1)[2] ^= 1


def on(kind: type, row: int | None) -> Callable[[Request], None]:
    """Damages all requests of a kind, or one row of them."""

    def damage(request: Request) -> None:
        if isinstance(request, kind):
            flip(request.tensor if row is None else request.tensor[row])

    return damage


DAMAGES = [
    ("all_gather", on(AllGather, None), False),
    ("sharded", on(AllToAll, 0), True),  # what rank 1 sends to rank 0, which alone reads it
    ("sharded", on(AllToAll, 1), True),  # and to itself
    ("sharded", on(AllGather, None), False),
]


@pytest.mark.parametrize(
    ("exchange", "damage", "is_told"), DAMAGES, ids=["gather", "to an owner", "to itself", "from an owner"]
)
@pytest.mark.parametrize(("machines", "num_local"), [(2, 1), (3, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("buckets", [ONE_EACH, TOGETHER], ids=["one each", "together"])
def test_a_message_damaged_on_its_way_is_an_error_on_every_rank_and_changes_nothing(
    exchange: str, damage: Callable[[Request], None], is_told: bool, machines: int, num_local: int, buckets: Buckets
) -> None:
    """Damaged by its sender, so that all who read it see it. In `sharded` one rank alone reads a row and tells the
    others; inside a machine the others learn it from the rank that met it.
    """
    world = Topology(exchange, machines, num_local).world(MIXED, rule=Rule(0.5), fuse_below=20)
    for step in range(2):
        world.step(random_gradients(MIXED, machines * num_local, 0, step), buckets)
    before = world.snapshot()
    culprit = world.transports[num_local]  # the first local rank of machine 1
    culprit.__class__ = Damaging
    assert isinstance(culprit, Damaging)
    culprit.damage = damage
    futures = world.start(random_gradients(MIXED, machines * num_local, 0, 2), buckets)
    texts = []
    expected = r"step 2, (message of|local) rank \d.* for [a-e] \.\. [a-e]: .*nothing was applied"
    for replica, made in zip(world.replicas, futures, strict=True):
        assert all(future.done() for future in made)
        with pytest.raises(CodecError, match=expected) as caught:
            replica.finish(made, buckets)
        texts.append(str(caught.value))
    assert any("message of rank 1 for " in one and "checksum" in one for one in texts)
    assert any("that rank could not read what it was sent" in one for one in texts) == is_told
    assert unchanged(before, world.snapshot())
    culprit.damage = None
    world.step(random_gradients(MIXED, machines * num_local, 0, 3), buckets)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_messages_of_two_steps_do_not_mix(exchange: str) -> None:
    world = World(2, 1, MIXED, exchange=exchange)
    world.replicas[1].state.step = 1
    futures = world.start(random_gradients(MIXED, 2, 0), TOGETHER)
    for replica, made in zip(world.replicas, futures, strict=True):
        with pytest.raises(CodecError, match="another step or layout"):
            replica.finish(made, TOGETHER)
