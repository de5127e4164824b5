"""Gradient noise measured in an exchange, for the optimizers whose rates follow it."""

import logging
import math
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import Worker, batch, mlp, residuals, same, seeded, worker
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distrobust
from distrobust.errors import ConfigError
from distrobust.optim import groups
from distrobust.optim.adaptive import NoiseAdaptive
from distrobust.optim.lanton import Lanton
from distrobust.optim.noise import TemporalNoise

pytestmark = pytest.mark.ranks
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def adaptive_worker(rank: Rank, density: float, alpha: float = 0.01, beta2: float = 0.0, **options: Any) -> Worker:
    net = seeded(mlp)
    ddp = DistributedDataParallel(net, process_group=rank.group)
    optimizer = NoiseAdaptive(torch.optim.SGD(net.parameters(), **SGD), ddp, alpha=alpha, beta2=beta2)
    compression = distrobust.compress(ddp, optimizer, density, fuse_below=100, **options)
    return Worker(ddp, optimizer, compression, rank.rank)


def noise_of(ours: Worker) -> dict[str, float]:
    assert isinstance(ours.optimizer, NoiseAdaptive | Lanton)
    assert ours.optimizer.noise is not None
    return ours.optimizer.noise.by_name()


def gradients(net: nn.Module, step: int, rank: int) -> dict[str, Tensor]:
    x, y = batch(step, rank)
    found = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters()))
    return {name: g.double() for (name, _), g in zip(net.named_parameters(), found, strict=True)}


def true_spread(net: nn.Module, step: int, num_ranks: int) -> dict[str, float]:
    local = [gradients(net, step, rank) for rank in range(num_ranks)]
    means = {name: sum(g[name] for g in local) / num_ranks for name in local[0]}
    return {
        name: 2 / num_ranks * sum(float((g[name] - mean).square().sum()) for g in local) / (num_ranks - 1)
        for name, mean in means.items()
    }


class Watching:
    """Stands in for an optimizer with an observer of its own."""

    wants_mean, width, is_due, noise = False, 2, True, "watched"

    def __init__(self, inner: torch.optim.Optimizer, rank: int, wants_mean: bool) -> None:
        self.optimizers, self.ratios, self.rank, self.wants_mean = [inner], dict[str, float](), rank, wants_mean
        self.commits: list[tuple[dict[str, Tensor], bool]] = []

    def observer_for(self, num_ranks: int, always_dense: bool, parameters: Any) -> "Watching":
        return self

    def observe(self, name: str, gradient: Tensor) -> Tensor:
        return torch.tensor([float(len(name)), float(self.rank)])

    def compare(self, name: str, gradient: Tensor, mean: Tensor) -> Tensor:
        return (gradient.sum() - mean.sum()).view(1)

    def commit(self, rows: dict[str, Tensor], is_local: bool) -> None:
        self.commits.append((rows, is_local))


def watching(rank: Rank, density: float, wants_mean: bool, **options: Any) -> tuple[Worker, Watching]:
    net = seeded(mlp)
    ddp = DistributedDataParallel(net, process_group=rank.group)
    sgd = torch.optim.SGD(net.parameters(), **SGD)
    watch = Watching(sgd, rank.rank, wants_mean)
    compression = distrobust.compress(ddp, watch, density, fuse_below=100, **options)  # type: ignore[arg-type]
    return Worker(ddp, sgd, compression, rank.rank), watch


@pytest.mark.parametrize("exchange", ["all_gather", "sharded"])
@pytest.mark.parametrize("wants_mean", [False, True])
def test_every_rank_gets_what_every_rank_observed_in_the_order_of_ranks(exchange: str, wants_mean: bool) -> None:
    def body(rank: Rank) -> None:
        ours, watch = watching(rank, 0.02, wants_mean, exchange=exchange)
        ours.step(0)
        [(rows, is_local)] = watch.commits
        assert is_local
        assert set(rows) == set(ours.state.parameters)
        for name, row in rows.items():
            assert row.tolist() == [[len(name), rank] for rank in range(3)]

    run_ranks(3, body)


def test_in_dense_phases_the_mean_is_observed_or_every_rank_compares_with_it() -> None:
    def body(rank: Rank) -> None:
        ours, watch = watching(rank, 1.0, wants_mean=False)
        ours.step(0)
        [(rows, is_local)] = watch.commits
        assert not is_local
        assert all(row.tolist() == [[len(name), rank.rank]] for name, row in rows.items())

        ours, watch = watching(rank, 1.0, wants_mean=True)
        start = seeded(mlp)
        ours.step(0)
        [(rows, is_local)] = watch.commits
        assert not is_local
        local = [gradients(start, 0, r) for r in range(3)]
        for name, row in rows.items():
            sums = torch.stack([g[name].sum() for g in local])
            torch.testing.assert_close(row.view(-1).double(), sums - sums.mean(), rtol=1e-4, atol=1e-5)

    run_ranks(3, body)


def test_a_dense_step_that_does_not_measure_sends_the_gradient_and_nothing_else() -> None:
    """By the bytes; and H is that of the step that measured last."""

    def body(rank: Rank) -> None:
        net = seeded(mlp)
        ddp = DistributedDataParallel(net, process_group=rank.group)
        optimizer = Lanton(net, 0.01, beta2=0.0, noise_every=3, overrides=dict.fromkeys(["*"], "frobenius"))
        compression = distrobust.compress(ddp, optimizer, 1.0, momentum="optimizer")
        ours, sent, dense_bytes = Worker(ddp, optimizer, compression, rank.rank), [0], [0]
        for step in range(6):
            expected = true_spread(net, step, 3) if step % 3 == 2 else noise_of(ours)
            ours.step(step)
            assert noise_of(ours) == pytest.approx(expected, rel=1e-4)
            sent.append(compression.sent_bytes)
            dense_bytes.append(compression.dense_bytes)
        extra = [b - a - (d - c) for a, b, c, d in zip(sent, sent[1:], dense_bytes, dense_bytes[1:], strict=False)]
        assert [more > 0 for more in extra] == [False, False, True] * 2

    run_ranks(3, body)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_dense_the_spread_is_exact(num_ranks: int) -> None:
    def body(rank: Rank) -> None:
        ours = adaptive_worker(rank, 1.0)
        for step in range(3):
            expected = true_spread(ours.ddp.module, step, num_ranks)
            ours.step(step)
            assert noise_of(ours) == pytest.approx(expected, rel=1e-4)

    run_ranks(num_ranks, body)


def test_compressed_the_spread_is_right_on_average() -> None:
    """Relative deviation of one step sqrt(2 / (4 (4 - 1))) = 0.41 or a little more where few coordinates hold the
    noise; the mean of 60 steps is known to 0.053, of four matrices' to about 0.03."""

    def body(rank: Rank) -> list[float]:
        ours = adaptive_worker(rank, 0.02)
        ratios = []
        for step in range(60):
            expected = true_spread(ours.ddp.module, step, 4)
            ours.step(step)
            found = noise_of(ours)
            ratios += [found[name] / expected[name] for name in expected if name.endswith("weight")]
        return ratios

    ratios = torch.tensor(run_ranks(4, body)[0])
    assert float(ratios.mean()) == pytest.approx(1.0, abs=5 * 0.03)


@pytest.mark.parametrize("density", [1.0, 0.02])
def test_noise_and_ratios_are_the_same_on_every_rank_to_the_bit(density: float) -> None:
    def body(rank: Rank) -> tuple[dict[str, float], dict[str, float], dict[str, Tensor]]:
        ours = adaptive_worker(rank, density, num_steps=10, warmup=0.3)  # through a dense phase
        for step in range(6):
            ours.step(step)
        assert isinstance(ours.optimizer, NoiseAdaptive)
        return noise_of(ours), ours.optimizer.ratios, ours.parameters()

    first, *others = run_ranks(3, body)
    assert min(first[1].values()) < 0.95
    for one in others:
        assert one[:2] == first[:2]
        assert same(one[2], first[2])


@pytest.mark.parametrize("density", [1.0, 0.02])
def test_measuring_changes_nothing_but_the_rates(density: float) -> None:
    """alpha far above the noise: every ratio is 1 to the last bit of a float."""

    def body(rank: Rank) -> None:
        ours = adaptive_worker(rank, density, alpha=1e12)
        theirs = worker(rank, density=density)
        for step in range(4):
            ours.step(step)
            theirs.step(step)
        assert same(ours.parameters(), theirs.parameters())
        assert same(residuals(ours.state), residuals(theirs.state))

    run_ranks(2, body)


@pytest.mark.parametrize("density", [1.0, 0.02])
def test_a_skipped_step_leaves_no_trace_in_the_noise(density: float) -> None:
    def body(rank: Rank) -> None:
        ours, twin = adaptive_worker(rank, density, beta2=0.5), adaptive_worker(rank, density, beta2=0.5)
        for step in range(3):
            if step == 2:
                ours.optimizer.zero_grad()
                x, y = batch(9, rank.rank)
                factor = math.nan if rank.rank == 1 else 1.0
                (factor * nn.functional.cross_entropy(ours.ddp(x), y)).backward()
                ours.optimizer.step()
                assert ours.state.skipped
            for one in (ours, twin):
                one.step(step)
        assert noise_of(ours) == noise_of(twin)
        assert same(ours.parameters(), twin.parameters())

    run_ranks(2, body)


@pytest.mark.parametrize("density", [1.0, 0.02])
def test_noise_is_that_of_unscaled_gradients(density: float) -> None:
    """Powers of two scale and unscale without rounding."""

    def body(rank: Rank) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plain, scaled = adaptive_worker(rank, density), adaptive_worker(rank, density, scaler=scaler)
        for step in range(3):
            plain.step(step)
            scaled.optimizer.zero_grad()
            x, y = batch(step, rank.rank)
            scaler.scale(nn.functional.cross_entropy(scaled.ddp(x), y)).backward()
            scaler.step(scaled.optimizer)
            scaler.update()
            assert noise_of(scaled) == pytest.approx(noise_of(plain), rel=1e-6)

    run_ranks(2, body)


def test_one_worker_compares_successive_gradients_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def body(rank: Rank) -> None:
        ours = adaptive_worker(rank, 0.02)
        before = None
        for step in range(3):
            g = gradients(ours.ddp.module, step, 0)
            ours.step(step)
            if before is not None:
                expected = {name: float((g[name] - before[name]).square().sum()) for name in g}
                assert noise_of(ours) == pytest.approx(expected, rel=1e-4)
            before = g

    groups.log.cache_clear()
    with caplog.at_level(logging.INFO):
        run_ranks(1, body)
    assert "NoiseAdaptive: noise from successive gradients, since there is one worker" in caplog.messages


def test_stepping_ahead_goes_at_each_layers_own_rate() -> None:
    def body(rank: Rank) -> None:
        ours = adaptive_worker(rank, 0.02, step_ahead=True)
        for step in range(3):
            ours.step(step)
        assert isinstance(ours.optimizer, NoiseAdaptive)
        before = ours.parameters()
        ours.state.step_ahead()
        for name, now in ours.parameters().items():
            moved = (before[name] - now).reshape(-1)
            expected = SGD["lr"] * ours.optimizer.ratios[name] * ours.state.residuals[name].v
            torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
        assert min(ours.optimizer.ratios.values()) < 0.95

    run_ranks(2, body)


@pytest.mark.parametrize("every", [1, 2])
def test_lanton_runs_on_compressed_gradients_with_the_noise_of_the_whole_ones(every: int) -> None:
    def body(rank: Rank) -> dict[str, Tensor]:
        net = seeded(mlp)
        ddp = DistributedDataParallel(net, process_group=rank.group)
        optimizer = Lanton(net, 0.01, beta2=0.0, alpha=1e-3, noise_every=every)
        compression = distrobust.compress(ddp, optimizer, 0.02, momentum="optimizer", fuse_below=100)
        ours = Worker(ddp, optimizer, compression, rank.rank)
        twins = [
            TemporalNoise(dict(net.named_parameters()), optimizer.noise.norms, 0.0, every)  # type: ignore[union-attr]
            for _ in range(2)
        ]
        for step in range(5):
            for r, twin in enumerate(twins):
                twin.measure({name: g.float() for name, g in gradients(net, step, r).items()})
            ours.step(step)
        expected = {name: (h + twins[1].by_name()[name]) / 2 / 2 for name, h in twins[0].by_name().items()}
        assert noise_of(ours) == pytest.approx(expected, rel=1e-3)
        return ours.parameters()

    one, two = run_ranks(2, body)
    assert same(one, two)


@pytest.mark.parametrize("given", ["the wrapped model", "groups by hand"])
def test_the_exchanges_names_are_taken_on_and_what_was_measured_is_kept(given: str) -> None:
    def body(rank: Rank) -> None:
        net = seeded(mlp)
        ddp = DistributedDataParallel(net, process_group=rank.group)
        matrices = [{"params": [p for p in net.parameters() if p.ndim > 1], "norm": "spectral"}]
        vectors = [{"params": [p for p in net.parameters() if p.ndim < 2], "norm": "rms"}]
        optimizer = Lanton(ddp if given == "the wrapped model" else matrices + vectors, 0.01, noise_every=1)
        for step in range(2):  # alone, before there is an exchange
            optimizer.zero_grad()
            x, y = batch(step, 0)
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        assert optimizer.noise is not None
        before = sorted(optimizer.noise.by_name().values())
        distrobust.compress(ddp, optimizer, 0.02, momentum="optimizer", fuse_below=100)
        assert set(optimizer.noise.by_name()) == set(dict(net.named_parameters()))
        assert sorted(optimizer.noise.by_name().values()) == before
        ours = Worker(ddp, optimizer, None, rank.rank)
        ours.step(2)
        assert set(optimizer.ratios) == set(dict(net.named_parameters()))

    run_ranks(2, body)


class Branches(nn.Module):
    """The second branch is used in the first two steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.steps = nn.Linear(20, 10), nn.Linear(20, 10), 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        result: Tensor = self.one(x) + (self.two(x) if self.steps <= 2 else 0.0)
        return result


@pytest.mark.parametrize("density", [1.0, 0.02])
def test_the_noise_of_a_parameter_nobody_used_stays(density: float) -> None:
    def body(rank: Rank) -> None:
        net = seeded(Branches)
        ddp = DistributedDataParallel(net, process_group=rank.group, find_unused_parameters=True)
        optimizer = NoiseAdaptive(torch.optim.SGD(net.parameters(), **SGD), ddp)
        ours = Worker(ddp, optimizer, distrobust.compress(ddp, optimizer, density, fuse_below=0), rank.rank)
        for step in range(2):
            ours.step(step)
        before = noise_of(ours)
        for step in range(2, 5):
            ours.step(step)
        after = noise_of(ours)
        assert {n: h for n, h in after.items() if "two" in n} == {n: h for n, h in before.items() if "two" in n}
        assert after["one.weight"] != before["one.weight"]

    run_ranks(2, body)


def test_combinations_that_cannot_be_right_are_refused() -> None:
    def body(rank: Rank) -> None:
        net = seeded(mlp)
        ddp = DistributedDataParallel(net, process_group=rank.group)
        with pytest.raises(ConfigError, match=r"optimizer Lanton: its first moment .*pass momentum='optimizer'"):
            distrobust.compress(ddp, Lanton(net), 0.02)
        halves = [list(net.parameters())[:3], list(net.parameters())[3:]]
        two = [NoiseAdaptive(torch.optim.SGD(half, lr=0.1), net) for half in halves]
        with pytest.raises(ConfigError, match=r"two optimizers that measure gradient noise, wanted one; hand all"):
            distrobust.compress(ddp, two, 0.02)

    run_ranks(1, body)
