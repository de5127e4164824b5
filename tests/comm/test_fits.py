"""What DDP, mixed precision and optimizers can be combined with: the same laws in every combination.

Single modes are the subject of test_buckets.py, loss scales of test_skipped_steps.py.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import batch, mlp, residuals, same, seeded, worker
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distrobust
from distrobust.comm.state import Compression
from distrobust.errors import ConfigError

pytestmark = pytest.mark.ranks
STEPS, RATE, DENSITY, FUSE_BELOW = 4, 0.05, 0.02, 100
Optimizers = list[torch.optim.Optimizer]


def sgd(**options: Any) -> Callable[[nn.Module], Optimizers]:
    return lambda net: [torch.optim.SGD(net.parameters(), lr=RATE, **options)]


def muon_and_adamw(net: nn.Module) -> Optimizers:
    """Muon takes matrices only."""
    matrices = [p for p in net.parameters() if p.dim() == 2]
    others = [p for p in net.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=RATE), torch.optim.AdamW(others, lr=RATE)]


@dataclass(frozen=True)
class Optimizing:
    """`make` as a user writes it; `left` what remains of it once m, nesterov and decay have moved into the residual."""

    make: Callable[[nn.Module], Optimizers]
    left: Callable[[nn.Module], Optimizers]
    options: dict[str, Any] = field(default_factory=dict)
    m: float = 0.0
    nesterov: bool = False
    decay: float = 0.0


def kept(make: Callable[[nn.Module], Optimizers]) -> Optimizing:
    """Plain error feedback: the optimizer stays as it is."""
    return Optimizing(make, make, {"momentum": "optimizer"})


OPTIMIZERS = {
    "SGD": Optimizing(sgd(), sgd()),
    "Nesterov": Optimizing(
        sgd(momentum=0.5, nesterov=True, weight_decay=2**-6), sgd(), m=0.5, nesterov=True, decay=2**-6
    ),
    "SGD keeps its momentum": kept(sgd(momentum=0.9, weight_decay=0.01)),
    "AdamW": kept(lambda net: [torch.optim.AdamW(net.parameters(), lr=RATE)]),
    "Muon and AdamW": kept(muon_and_adamw),
}
MODES: dict[str, dict[str, Any]] = {
    "usual": {},
    "static_graph": {"static_graph": True},
    "find_unused": {"find_unused_parameters": True},
}


@dataclass(frozen=True)
class Combination:
    ddp: dict[str, Any]
    optimizing: Optimizing
    parts: int  # backward passes a step, all but the last under no_sync
    autocast: bool
    scaler: bool


def combine(mode: str, view: bool, parts: int, amp: bool, name: str) -> tuple[str, Combination]:
    ddp = {**MODES[mode], "gradient_as_bucket_view": view, "bucket_cap_mb": 4e-3}
    text = f"{mode}, {'views' if view else 'copies'}, {parts} parts, {'bf16' if amp else 'fp32'}, {name}"
    return text, Combination(ddp, OPTIMIZERS[name], parts, amp, scaler=amp)


COMBINATIONS = dict(
    [
        combine(mode, view, parts, view == (parts == 2), "Nesterov")
        for mode, view, parts in itertools.product(MODES, (False, True), (1, 2))
        if (mode, parts) != ("static_graph", 2)  # without a hook too, torch 2.13 stops at an assertion of its own
    ]
    + [combine("usual", True, 2, amp, name) for amp, name in itertools.product((False, True), OPTIMIZERS)]
)


def backward(
    model: nn.Module, how: Combination, step: int, rank: int, scaled: Callable[[Tensor], Tensor] = torch.clone
) -> None:
    """Adds the gradient of a step to the parameters' .grad, in how.parts passes."""
    x, y = batch(step, rank)
    pieces = list(zip(x.chunk(how.parts), y.chunk(how.parts), strict=True))
    for i, (images, labels) in enumerate(pieces):
        last = i == len(pieces) - 1
        quiet = nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()
        with quiet:
            with torch.autocast("cpu", torch.bfloat16, enabled=how.autocast):
                loss = nn.functional.cross_entropy(model(images).float(), labels)
            scaled(loss / how.parts).backward()


def trained(rank: Rank, how: Combination, density: float | None) -> tuple[dict[str, Tensor], Compression | None]:
    """With the real DDP; density None: no hook."""
    model = DistributedDataParallel(seeded(mlp), process_group=rank.group, **how.ddp)
    optimizers = how.optimizing.make(model.module)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=2, enabled=how.scaler)
    compression = None
    if density is not None:
        options = {"fuse_below": FUSE_BELOW, "values": "fp32", **how.optimizing.options}
        options["scaler"] = scaler if how.scaler else None
        given = optimizers if len(optimizers) > 1 else optimizers[0]
        compression = distrobust.compress(model, given, density=density, **options)
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, how, step, rank.rank, scaler.scale)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}, compression


@pytest.mark.parametrize("how", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_density_one_equals_plain_ddp_to_the_bit(how: Combination) -> None:
    def body(rank: Rank) -> None:
        plain, _ = trained(rank, how, None)
        ours, compression = trained(rank, how, 1.0)
        assert same(ours, plain)
        assert compression is not None
        assert compression.step == STEPS

    run_ranks(2, body)


@pytest.mark.parametrize("how", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_a_compressed_run_equals_a_simulation_of_its_ranks(how: Combination) -> None:
    """To the bit: of two ranks' values there is one order to add them in, and scales, momentum and decay are powers of
    two, whose products do not round. bf16 gradients tie so often that anything less would select differently.
    """

    def body(rank: Rank) -> dict[str, Tensor]:
        return trained(rank, how, DENSITY)[0]

    first, second = run_ranks(2, body)
    assert same(first, second)
    assert same(first, simulated(how, 2))


def simulated(how: Combination, num_ranks: int) -> dict[str, Tensor]:
    """One process, no DDP, nothing of ours: momentum-corrected error feedback, the k largest of each tensor."""
    net, o = seeded(mlp), how.optimizing
    named = dict(net.named_parameters())
    optimizers = o.left(net)
    u, v = ([{name: torch.zeros_like(p) for name, p in named.items()} for _ in range(num_ranks)] for _ in "uv")
    choices = [[name] for name, p in named.items() if p.numel() >= FUSE_BELOW]
    choices.append([name for name, p in named.items() if p.numel() < FUSE_BELOW])
    for step in range(STEPS):
        mean = {name: torch.zeros_like(p) for name, p in named.items()}
        for rank in range(num_ranks):
            net.zero_grad()
            backward(net, how, step, rank)
            for name, p in named.items():
                assert p.grad is not None
                g = p.grad.add(p.detach(), alpha=o.decay)
                u[rank][name].mul_(o.m).add_(g)
                v[rank][name] += g.add(u[rank][name], alpha=o.m) if o.nesterov else u[rank][name]
            for names in choices:
                joined = torch.cat([v[rank][name].view(-1) for name in names])
                order = joined.abs().sort(descending=True, stable=True).indices  # ties, common in bf16: lowest first
                chosen = torch.zeros_like(joined, dtype=torch.bool)
                chosen[order[: max(1, int(DENSITY * len(joined) + 0.5))]] = True
                for name, flags in zip(names, chosen.split([named[name].numel() for name in names]), strict=True):
                    mask = flags.view_as(named[name])
                    mean[name] += torch.where(mask, v[rank][name], 0.0) / num_ranks
                    v[rank][name][mask], u[rank][name][mask] = 0.0, 0.0
        for name, p in named.items():
            p.grad = mean[name]
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach().clone() for name, p in named.items()}


class TwoPrecisions(nn.Module):
    """Buckets of two dtypes; the small tensors of both are selected together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 30), nn.Linear(30, 10).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh().to(torch.bfloat16)).float()


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_parameters_of_two_precisions_train_alike_on_all_ranks(density: float) -> None:
    def body(rank: Rank) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ours = worker(rank, TwoPrecisions, density=density, ddp={"bucket_cap_mb": 1e-3})
        start = ours.parameters()
        for step in range(5):
            ours.step(step)
        return start, ours.parameters()

    (start, first), (_, second) = run_ranks(2, body)
    assert same(first, second)
    assert not any(torch.equal(first[name], start[name]) for name in first)


def closure_of(one: Any, step: int, factor: float = 1.0) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        x, y = batch(step, one.rank)
        one.optimizer.zero_grad()
        loss = factor * nn.functional.cross_entropy(one.ddp(x), y)
        loss.backward()
        return loss.detach()

    return closure


def test_a_step_with_a_closure_is_the_same_step_and_is_skipped_like_any_other() -> None:
    """Lightning runs backward inside optimizer.step(closure): the gradient is judged after it, not before."""

    def body(rank: Rank) -> None:
        ours, usual = worker(rank), worker(rank)
        for step in range(2):
            assert float(ours.optimizer.step(closure_of(ours, step))) > 0
            usual.step(step)
        assert same(ours.parameters(), usual.parameters())
        before, kept = ours.parameters(), residuals(ours.state)
        ours.optimizer.step(closure_of(ours, 90, math.nan if rank.rank == 0 else 1.0))
        assert ours.state.skipped
        assert same(ours.parameters(), before)
        assert same(residuals(ours.state), kept)
        ours.optimizer.step(closure=closure_of(ours, 2))
        usual.step(2)
        assert not ours.state.skipped
        assert same(ours.parameters(), usual.parameters())

    run_ranks(2, body)


def test_gradients_accumulated_after_a_skipped_step_survive_until_the_closure() -> None:
    """The step before was skipped; what no_sync gathered since belongs to the next one."""

    def body(rank: Rank) -> None:
        ours, twin = worker(rank, density=1.0), worker(rank, density=1.0)
        ours.optimizer.step(closure_of(ours, 90, math.nan))
        for one in (ours, twin):
            x, y = batch(0, rank.rank)
            one.optimizer.zero_grad()
            with one.ddp.no_sync():
                nn.functional.cross_entropy(one.ddp(x), y).backward()

        def last(one: Any = ours) -> None:
            nn.functional.cross_entropy(one.ddp(x), y).backward()

        ours.optimizer.step(last)
        last(twin)
        twin.optimizer.step()
        assert same(ours.parameters(), twin.parameters())

    run_ranks(2, body)


def test_two_optimizers_are_both_emptied_and_both_skip() -> None:
    def make(parameters: Sequence[nn.Parameter]) -> Optimizers:
        listed = list(parameters)
        return [
            torch.optim.SGD(listed[:2], lr=0.1, momentum=0.9),
            torch.optim.SGD(listed[2:], lr=0.2, momentum=0.5, weight_decay=0.01),
        ]

    def body(rank: Rank) -> None:
        model = DistributedDataParallel(mlp(), process_group=rank.group)
        optimizers = make(list(model.parameters()))
        state = distrobust.compress(model, optimizers, density=0.05)
        assert [one.param_groups[0]["momentum"] for one in optimizers] == [0.0, 0.0]
        assert [state.residuals[name].rule.momentum for name in ("0.weight", "4.bias")] == [0.9, 0.5]
        before = [p.detach().clone() for p in model.parameters()]
        x, _ = batch(0, rank.rank)
        (model(x).sum() * math.nan).backward()
        for one in optimizers:
            one.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    run_ranks(2, body)


class WithEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8, sparse=True)


class WithComplex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


def all_in(kind: Callable[..., Any], **options: Any) -> Callable[[nn.Module], Any]:
    return lambda net: kind(net.parameters(), **options)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], dict[str, Any], str]] = {
    "sparse gradients": (
        WithEmbedding,
        all_in(torch.optim.SGD),
        {},
        r"embedding 'table' has sparse gradients, wanted dense ones.*sparse=False",
    ),
    "complex parameters": (
        WithComplex,
        all_in(torch.optim.SGD),
        {},
        r"parameter 'w' is complex \(torch.complex64\), wanted real numbers.*view_as_real",
    ),
    "several gradients a step": (
        mlp,
        all_in(torch.optim.LBFGS),
        {"momentum": "optimizer"},
        r"optimizer LBFGS: it evaluates the loss several times a step.*one gradient a step",
    ),
    "Muon alone": (
        mlp,
        lambda net: muon_and_adamw(net)[0],
        {"momentum": "optimizer"},
        r"3 parameters of the model are not in the optimizer, first '0.bias'",
    ),
    "Muon without asking for plain error feedback": (
        mlp,
        muon_and_adamw,
        {},
        r"optimizer Muon: its first moment cannot be moved.*momentum='optimizer'",
    ),
    "one parameter in two optimizers": (
        mlp,
        lambda net: [torch.optim.SGD(net.parameters()), torch.optim.SGD(list(net.parameters())[:1])],
        {},
        r"a parameter is in two optimizers and would be stepped twice",
    ),
    "no optimizer": (mlp, lambda net: [nn.Linear(1, 1)], {}, r"got a Linear as optimizer, wanted a torch.optim.Opt"),
}


@pytest.mark.parametrize(("build", "make", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_right_is_refused_with_the_reason(
    build: Callable[[], nn.Module], make: Callable[[nn.Module], Any], options: dict[str, Any], message: str
) -> None:
    def body(rank: Rank) -> None:
        model = DistributedDataParallel(build(), process_group=rank.group)
        with pytest.raises(ConfigError, match=message):
            distrobust.compress(model, make(model.module), **options)

    run_ranks(1, body)
