"""The laws every exchange obeys, on N ranks of one thread. A new exchange is one row of EXCHANGES."""

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.replicas import Buckets, Gradients, Replica, World, random_gradients, unchanged
from harness.topologies import MIXED, ONE_EACH, SMALL_LAST, TOGETHER, TOPOLOGIES, Topology, each_topology, several
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distrobust.comm.exchange import EXCHANGES
from distrobust.comm.transport import Transport
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES
from distrobust.compression.memory import Rule

topologies = st.sampled_from(TOPOLOGIES)
networks = st.sampled_from(
    [
        (MIXED, 20),
        (MIXED, 0),
        ({"a": 900, "b": 300}, 0),
        ({"a": 2, "b": 1, "c": 3}, 0),  # fewer places than ranks: parts of the line with nothing in them
        ({"a": 2, "b": 1, "c": 3}, 20),  # and nothing but small ones
        ({"a": 1}, 0),
        ({"a": 1}, 20),
        ({"a": 400, "b": 1}, 20),
    ]
)


@st.composite
def divisions(draw: st.DrawFn, sizes: dict[str, int]) -> list[list[str]]:
    """The parameters in any order, in any number of buckets."""
    names = draw(st.permutations(list(sizes)))
    buckets: list[list[str]] = [[]]
    for name in names:
        if buckets[-1] and draw(st.booleans()):
            buckets.append([])
        buckets[-1].append(name)
    return buckets


class Ledger:
    """In float64: what was accumulated by all machines and what was applied, N-fold. `bound`: the largest of any
    number.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.accumulated = {name: torch.zeros(n, dtype=torch.float64) for name, n in world.sizes.items()}
        self.velocity = {name: torch.zeros(n, dtype=torch.float64) for name, n in world.sizes.items()}
        self.applied = {name: torch.zeros(n, dtype=torch.float64) for name, n in world.sizes.items()}
        self.bound = 0.0
        self.num_steps = 0

    def book(self, gradients: list[Gradients], means: Gradients, rule: Rule) -> None:
        n, num_local = self.world.num_machines, self.world.num_local
        self.num_steps += 1
        for name in self.world.sizes:
            g = torch.stack([one[name].double() for one in gradients]).sum(0) / num_local
            self.velocity[name] = rule.momentum * self.velocity[name] + g
            step = g + rule.momentum * self.velocity[name] if rule.nesterov else self.velocity[name]
            self.accumulated[name] += step
            self.applied[name] += n * means[name].double()
            largest = [step, self.velocity[name], means[name], *(one[name] for one in gradients)]
            largest += [self.world.of_machine(m, name) for m in range(n)]
            self.bound = max(self.bound, *(float(t.abs().max()) for t in largest))

    def check(self) -> None:
        """Applied and kept are what was accumulated. Roundings of a step and coordinate, each of at most 2^-24 of a
        number below N x bound: a machine's mean (L), velocity, accumulation and what is sent (5, on each of N
        machines), the owner's sum (N), the mean (N additions, N divisions) and its product with N; momentum carries
        them on, 1 / (1 - m) = 2.
        """
        n, num_local = self.world.num_machines, self.world.num_local
        roundings = n * (num_local + 5) + 3 * n + 1
        tolerance = 2 * self.num_steps * roundings * 2.0**-24 * n * self.bound
        for name in self.world.sizes:
            difference = self.applied[name] + self.world.kept(name) - self.accumulated[name]
            assert float(difference.abs().max()) <= tolerance, name


def identical(means: list[Gradients]) -> bool:
    return all(torch.equal(one[name], means[0][name]) for one in means for name in one)


rules = st.sampled_from(
    [Rule(0.0), Rule(0.5, masking=False), Rule(0.5, nesterov=True, masking=False), Rule(0.0, masking=False)]
)


@settings(max_examples=60)
@given(
    topologies,
    networks,
    rules,
    st.sampled_from(list(VALUE_CODES)),
    st.sampled_from(list(INDEX_CODES)),
    st.sampled_from([0.02, 0.2, 0.7]),
    st.sampled_from(["sampled", "exact"]),
    st.integers(0, 10**6),
    st.data(),
)
def test_ranks_agree_to_the_bit_and_nothing_is_lost(
    topology: Topology,
    network: tuple[dict[str, int], int],
    rule: Rule,
    values: str,
    indices: str,
    density: float,
    selector: str,
    seed: int,
    data: st.DataObject,
) -> None:
    """N x applied + kept = accumulated, over four steps that divide the parameters into buckets in their own ways."""
    sizes, fuse_below = network
    options = {"values": values, "indices": indices, "density": density, "selector": selector}
    world = topology.world(sizes, rule=rule, fuse_below=fuse_below, **options)
    ledger = Ledger(world)
    for step in range(4):
        gradients = random_gradients(sizes, topology.num_ranks, seed, step)
        means = world.step(gradients, data.draw(divisions(sizes)))
        assert identical(means)
        ledger.book(gradients, means[0], rule)
        ledger.check()
        assert any(bool(mean.any()) for mean in means[0].values())
        assert len({replica.state.sent_bytes for replica in world.replicas}) == 1


@settings(max_examples=30)
@given(
    topologies,
    networks,
    rules,
    st.sampled_from(["fp32", "4bit"]),
    st.lists(st.sampled_from([1.0, 1.0, 0.3, 0.05]), min_size=3, max_size=6),
    st.integers(0, 10**6),
    st.data(),
)
def test_nothing_is_lost_between_dense_and_sparse_steps(
    topology: Topology,
    network: tuple[dict[str, int], int],
    rule: Rule,
    values: str,
    plan: list[float],
    seed: int,
    data: st.DataObject,
) -> None:
    """In any order; after a dense step nothing is kept and the momentum is the same on every machine."""
    sizes, fuse_below = network
    world = topology.world(sizes, rule=rule, fuse_below=fuse_below, values=values)
    ledger = Ledger(world)
    for step, density in enumerate(plan):
        world.set_density(density)
        gradients = random_gradients(sizes, topology.num_ranks, seed, step)
        means = world.step(gradients, data.draw(divisions(sizes)))
        assert identical(means)
        ledger.book(gradients, means[0], rule)
        ledger.check()
        if density == 1.0:
            for name in sizes:
                assert not world.kept(name).any()
                velocities = [world.of_machine(m, name, "u") for m in range(topology.machines)]
                assert all(torch.equal(one, velocities[0]) for one in velocities)


@each_topology
@pytest.mark.parametrize("buckets", [ONE_EACH, TOGETHER], ids=["one each", "together"])
@pytest.mark.parametrize("density", [1.0, 0.9999])
def test_with_everything_sent_every_exchange_is_the_mean(topology: Topology, density: float, buckets: Buckets) -> None:
    """Density 1 is a dense step; 0.9999 of at most 1,200 coordinates rounds to all of them in a sparse one.

    N L + 2 roundings of a sum of N L numbers. What is left of a coordinate that was sent is that of x - N (x / N).
    """
    world = topology.world(MIXED, density=density, fuse_below=20)
    tolerance = (topology.num_ranks + 2) * 2.0**-24
    for step in range(2):
        gradients = random_gradients(MIXED, topology.num_ranks, 3, step)
        means = world.step(gradients, buckets)
        assert identical(means)
        for name in MIXED:
            stacked = torch.stack([one[name].double() for one in gradients])
            largest = float(stacked.abs().sum(0).max())
            difference = (means[0][name].double() - stacked.mean(0)).abs()
            assert float(difference.max()) <= (step + 1) * tolerance * largest
            assert float(world.kept(name).abs().max()) <= (step + 1) * tolerance * largest
            if density == 1.0 or topology.exchange == "all_gather":
                assert not world.kept(name).any()


@each_topology
def test_a_dense_step_of_whole_numbers_is_the_exact_mean(topology: Topology) -> None:
    """Multiples of 12 x the number of ranks, below 2^20: whatever the order, nothing is rounded but 1 / 3, and back."""
    world = topology.world(MIXED, density=1.0, fuse_below=20)
    g = torch.Generator().manual_seed(0)
    gradients = [
        {
            name: torch.randint(-999, 1000, (n,), generator=g).float() * 12 * topology.num_ranks
            for name, n in MIXED.items()
        }
        for _ in range(topology.num_ranks)
    ]
    for buckets in (ONE_EACH, TOGETHER):
        means = world.step(gradients, buckets)
        for name in MIXED:
            expected = torch.stack([one[name].double() for one in gradients]).mean(0)
            assert torch.equal(means[0][name], expected.float())


@settings(max_examples=20)
@given(
    st.sampled_from([t for t in TOPOLOGIES if t.exchange == "all_gather"]),
    networks,
    st.sampled_from(list(VALUE_CODES)),
    st.sampled_from([Rule(0.0), Rule(0.9), Rule(0.9, nesterov=True, masking=False)]),
    st.integers(0, 10**6),
    st.data(),
)
def test_buckets_do_not_change_the_result_of_all_gather(
    topology: Topology, network: tuple[dict[str, int], int], values: str, rule: Rule, seed: int, data: st.DataObject
) -> None:
    """To the bit, residuals and momentum included. Not so for `sharded`, whose parts are those of a bucket, nor for
    Rice codes where indices do not fit: what is left out depends on the rest of the message.
    """
    sizes, fuse_below = network
    options = {"rule": rule, "values": values, "fuse_below": fuse_below}
    once, again = topology.world(sizes, **options), topology.world(sizes, **options)
    whole = [list(sizes)]
    for step in range(3):
        gradients = random_gradients(sizes, topology.num_ranks, seed, step)
        expected = once.step(gradients, whole)
        means = again.step(gradients, data.draw(divisions(sizes)))
        assert all(torch.equal(expected[0][name], means[0][name]) for name in sizes)
        assert unchanged(once.snapshot(), again.snapshot())


# ---- parameters nobody used ----


@several
@pytest.mark.parametrize("unused", ["a", "b"])
@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("buckets", [ONE_EACH, SMALL_LAST], ids=["one each", "small last"])
def test_a_parameter_nobody_used_keeps_what_it_has(
    topology: Topology, unused: str, density: float, buckets: Buckets
) -> None:
    """Large or small; DDP would drop the answer, so the residual keeps it. Used on one rank it is used."""
    world = topology.world(MIXED, rule=Rule(0.5), fuse_below=20, detect_unused=True)
    for step in range(2):
        world.step(random_gradients(MIXED, topology.num_ranks, 0, step), buckets)
    before = [one[unused] for one in world.snapshot()]
    assert any(bool(v.any()) for _, v, _ in before)
    world.set_density(density)
    gradients = random_gradients(MIXED, topology.num_ranks, 0, 2)
    for one in gradients:
        one[unused].zero_()
    means = world.step(gradients, buckets)
    assert not means[0][unused].any()
    after = [one[unused] for one in world.snapshot()]
    assert unchanged([{unused: one} for one in before], [{unused: one} for one in after])
    gradients = random_gradients(MIXED, topology.num_ranks, 0, 3)
    for one in gradients[1:]:
        one[unused].zero_()
    gradients[0][unused][:-1] = 0  # a piece of it that another rank of the machine owns
    means = world.step(gradients, buckets)
    assert identical(means)
    after = [one[unused] for one in world.snapshot()]
    assert not unchanged([{unused: one} for one in before], [{unused: one} for one in after])


# ---- rules that differ ----


@pytest.mark.parametrize("first", [0.0, 0.5])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_small_parameters_with_rules_of_their_own_are_each_masked_by_their_own(exchange: str, first: float) -> None:
    """Selected together, but momentum is each one's: what was sent has its velocity cleared, whoever comes first."""
    sizes = {"b": 20, "d": 20, "a": 300}
    rule = {"b": Rule(first), "d": Rule(0.5 - first), "a": Rule(0.5)}
    world = World(2, 1, sizes, rule=rule, exchange=exchange, fuse_below=30, density=0.2)
    with_momentum = "b" if first else "d"
    gradients = random_gradients(sizes, 2, 0)
    for one in gradients:
        one[with_momentum] *= 100  # so that it is what is sent
    mean = world.step(gradients, [["a", "b", "d"]])[0][with_momentum]
    assert int(mean.count_nonzero()) > 0
    velocities = torch.stack([world.of_machine(m, with_momentum, "u") for m in range(2)])
    assert bool(velocities.any())
    # sent by the machine that holds no velocity there any more
    assert bool((velocities[:, mean != 0] == 0).any(dim=0).all())


# ---- carriers ----


@pytest.mark.ranks
@pytest.mark.parametrize("topology", [t for t in TOPOLOGIES if t.num_ranks in (2, 3, 4)], ids=str)
@pytest.mark.parametrize("values", ["fp16", "4bit"])
def test_ranks_of_one_thread_and_ranks_over_gloo_get_the_same_bits(topology: Topology, values: str) -> None:
    """Several buckets, so that hops of several exchanges are under way at once; sparse steps, then dense, then sparse.
    The sum of a dense step is the carrier's, in its own order: beyond two machines it rounds in other ways.
    """
    options = {"values": values, "fuse_below": 20, "rule": Rule(0.5)}
    plan = (0.1, 0.1, 1.0, 0.05)

    def gradients(step: int) -> list[Gradients]:
        return random_gradients(MIXED, topology.num_ranks, 1, step)

    world = topology.world(MIXED, **options)
    expected = []
    for step, density in enumerate(plan):
        world.set_density(density)
        expected.append(world.step(gradients(step), ONE_EACH)[0])

    def body(rank: Rank) -> tuple[list[Gradients], dict[str, Tensor]]:
        machine, local = divmod(rank.rank, topology.local)
        across = rank.subgroup([m * topology.local + local for m in range(topology.machines)])
        within = rank.subgroup([machine * topology.local + i for i in range(topology.local)])
        transport = Transport(across, local=Transport(within) if topology.local > 1 else None)
        replica = Replica(transport, MIXED, exchange=topology.exchange, **options)
        means = []
        for step, density in enumerate(plan):
            replica.density = density
            means.append(replica.step(gradients(step)[rank.rank], ONE_EACH))
        return means, {name: residual.v for name, residual in replica.state.residuals.items()}

    for rank, (means, kept) in enumerate(run_ranks(topology.num_ranks, body)):
        exact = 4 if topology.machines <= 2 else 2
        for step in range(exact):
            assert all(torch.equal(means[step][name], expected[step][name]) for name in MIXED), step
        if exact == 4:
            ours = world.replicas[rank].state.residuals
            assert all(torch.equal(kept[name], ours[name].v) for name in MIXED)
