"""FSDP2's hybrid sharding on 2 machines of 2 ranks, in real processes, against an unsharded run written out here."""

import logging
import math
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.ranks import Processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from distrobust.comm.fsdp import ShardedCompression, compress_sharded
from distrobust.compression.density import Schedule
from distrobust.errors import CheckpointError, ConfigError
from distrobust.optim.adaptive import NoiseAdaptive
from distrobust.optim.lanton import Lanton

pytestmark = [pytest.mark.procs, pytest.mark.timeout(180)]
MACHINES, SHARDS, STEPS, RATE, DENSITY, FUSE_BELOW = 2, 2, 6, 0.05, 0.05, 100
SGD: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.8, "nesterov": True},
}


def net() -> nn.Sequential:
    """Odd sizes, so that the second rank's shards are smaller and padded; the last layer's bias, 1, leaves it none."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 41), nn.Tanh(), nn.Linear(41, 33), nn.Tanh(), nn.Linear(33, 1))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 20, generator=g), torch.randn(8, 1, generator=g)


def loss(model: nn.Module, step: int, rank: int) -> Tensor:
    x, y = batch(step, rank)
    return (model(x) - y).square().mean()


# ---- the unsharded reference: one process, imports nothing of ours ----


def reference(
    density: float, sgd: dict[str, Any], make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
) -> list[Tensor]:
    """Parameters after STEPS steps of momentum-corrected top-k of every shard, machines' means averaged.

    What `make` makes steps on that mean: SGD, whose momentum and weight decay are `sgd` and act before the top-k, or
    another, with moments of its own.
    """
    model = net()
    optimizer = make(model.parameters(), lr=RATE)
    m, nesterov, decay = sgd.get("momentum", 0.0), sgd.get("nesterov", False), sgd.get("weight_decay", 0.0)
    layers = [[(f"{i}.{kind}", getattr(model[i], kind)) for kind in ("weight", "bias")] for i in (0, 2, 4)]
    u, v = ({(k, n): torch.zeros_like(p) for n, p in model.named_parameters() for k in range(MACHINES)} for _ in "uv")
    for step in range(STEPS):
        sent = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for machine in range(MACHINES):
            model.zero_grad()
            mine = [loss(model, step, machine * SHARDS + shard) for shard in range(SHARDS)]
            (sum(mine) / SHARDS).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                g, key = p.grad + decay * p.detach(), (machine, name)
                u[key] = m * u[key] + g
                v[key] = v[key] + (g + m * u[key] if nesterov else u[key])
            for layer in layers:
                for shard in range(SHARDS):
                    rows = {name: _rows(len(p), shard) for name, p in layer}
                    groups = [[n] for n, p in layer if p[rows[n]].numel() >= FUSE_BELOW]
                    groups.append([n for n, p in layer if 0 < p[rows[n]].numel() < FUSE_BELOW])
                    for names in filter(None, groups):
                        joined = torch.cat([v[machine, n][rows[n]].reshape(-1) for n in names])
                        keep = torch.zeros_like(joined, dtype=torch.bool)
                        keep[joined.abs().topk(max(1, round(density * len(joined)))).indices] = True
                        for n, mask in zip(
                            names, keep.split([v[machine, n][rows[n]].numel() for n in names]), strict=True
                        ):
                            mask = mask.view_as(v[machine, n][rows[n]])
                            sent[n][rows[n]] += torch.where(mask, v[machine, n][rows[n]], 0.0)
                            v[machine, n][rows[n]] *= ~mask
                            if density < 1.0:  # a dense step keeps the momentum
                                u[machine, n][rows[n]] *= ~mask
        for name, p in model.named_parameters():
            p.grad = sent[name] / MACHINES
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def _rows(length: int, shard: int) -> slice:
    size = math.ceil(length / SHARDS)
    return slice(min(shard * size, length), min((shard + 1) * size, length))


# ---- ours, on each of the four ranks ----


class Run:
    def __init__(self, rank: int, mesh: Any, density: float, sgd: dict[str, Any], **options: Any) -> None:
        self.rank = rank
        self.model = net()
        if rank >= SHARDS:  # the second machine starts elsewhere: compress_sharded brings it here
            self.model[0].weight.data.zero_()
        self.shard(mesh["shard"])
        make: Callable[..., torch.optim.Optimizer] = options.pop("optimizer", torch.optim.SGD)
        self.optimizer = make(self.model.parameters(), lr=RATE, **sgd)
        machines = mesh["machine"].get_group()
        options = {"values": "fp32", "fuse_below": FUSE_BELOW, **options}
        self.state: ShardedCompression = compress_sharded(self.model, self.optimizer, machines, density, **options)

    def shard(self, mesh: Any) -> None:
        for layer in (self.model[0], self.model[2]):  # the root keeps the last layer for itself
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def backward(self, step: int, factor: float = 1.0) -> None:
        self.optimizer.zero_grad()
        (factor * loss(self.model, step, self.rank)).backward()

    def train(self, steps: range) -> "Run":
        for step in steps:
            self.backward(step)
            self.optimizer.step()
        return self

    def parameters(self) -> list[Tensor]:
        return [p.full_tensor().detach() for p in self.model.parameters() if isinstance(p, DTensor)]

    def residuals(self) -> list[Tensor]:
        return [t.clone() for piece in self.state.pieces.values() for t in (piece.residual.u, piece.residual.v)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def on_each_rank(rank: int, pipe: Connection) -> None:
    mesh = init_device_mesh("cpu", (MACHINES, SHARDS), mesh_dim_names=("machine", "shard"))
    for density in (DENSITY, 1.0):
        for name, sgd in SGD.items():
            run = Run(rank, mesh, density, sgd).train(range(STEPS))
            pipe.send((name, density, run.parameters(), run.state.sent_bytes))
    for law in LAWS:
        law(rank, mesh)
        pipe.send(law.__name__)


def a_non_finite_gradient_on_one_rank_leaves_no_trace_on_any(rank: int, mesh: Any) -> None:
    for density in (DENSITY, 1.0):
        run, twin = (Run(rank, mesh, density, SGD["momentum"]).train(range(2)) for _ in range(2))
        parameters, kept = run.parameters(), run.residuals()
        run.backward(90, math.nan if rank == 3 else 1.0)
        run.optimizer.step()
        assert run.state.skipped
        assert run.state.skipped_steps == 1
        assert equal(run.parameters(), parameters)
        assert equal(run.residuals(), kept)
        run.train(range(2, 4))
        twin.train(range(2, 4))
        assert equal(run.parameters(), twin.parameters())
        assert equal(run.residuals(), twin.residuals())


def a_backward_whose_gradients_are_thrown_away_leaves_no_trace(rank: int, mesh: Any) -> None:
    run, twin = (Run(rank, mesh, DENSITY, SGD["momentum"]).train(range(2)) for _ in range(2))
    run.backward(90)
    run.train(range(2, 4))
    twin.train(range(2, 4))
    assert equal(run.parameters(), twin.parameters())
    assert equal(run.residuals(), twin.residuals())


def a_loaded_state_continues_bit_identically_and_another_place_is_refused(rank: int, mesh: Any) -> None:
    whole = Run(rank, mesh, DENSITY, SGD["momentum"], num_steps=6, warmup=0.6).train(range(6))
    first = Run(rank, mesh, DENSITY, SGD["momentum"], num_steps=6, warmup=0.6).train(range(3))
    second = Run(rank, mesh, DENSITY, SGD["momentum"], num_steps=6, warmup=0.6)
    saved = first.state.state_dict()
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    second.state.load_state_dict(saved)
    second.train(range(3, 6))
    assert equal(second.parameters(), whole.parameters())
    assert equal(second.residuals(), whole.residuals())
    with pytest.raises(CheckpointError, match=r"residual of machine 7 of 2, shard \d of 2, this is machine"):
        second.state.load_state_dict({**saved, "place": (7, *saved["place"][1:])})
    with pytest.raises(CheckpointError, match=r"saved with momentum 0.9, .*decay 0.2, this run has .*decay 0.01"):
        second.state.load_state_dict({**saved, "rules": {"0.weight": (0.9, False, 0.2)}})
    saved["residuals"]["0.weight"]["v"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"residual of '0.weight': got shape \(3,\)"):
        second.state.load_state_dict(saved)


def accumulated_batches_are_exchanged_once(rank: int, mesh: Any) -> None:
    """Over two batches of half the size: the gradients agree to rounding, the messages in number and length."""
    whole, parts = (Run(rank, mesh, 1.0, SGD["momentum"]) for _ in range(2))
    for step in range(3):
        whole.backward(step)
        whole.optimizer.step()
        x, y = batch(step, rank)
        parts.optimizer.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            parts.model.set_requires_gradient_sync(half.start == 4)
            ((parts.model(x[half]) - y[half]).square().mean() / 2).backward()
        parts.optimizer.step()
    assert whole.state.sent_bytes == parts.state.sent_bytes
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3 * 20 * 2.0**-24)  # 3 steps of 20 roundings below 1
    loss(parts.model, 0, rank).backward()
    again = loss(parts.model, 1, rank)
    with pytest.raises(ConfigError, match=r"reduced twice before optimizer.step.*set_requires_gradient_sync"):
        again.backward()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.always, self.sometimes = nn.Linear(20, 30), nn.Linear(20, 30)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return (self.always(x) + (self.sometimes(x) if both else 0.0)).mean(1, keepdim=True)


def a_parameter_used_on_one_rank_alone_is_updated_on_all(rank: int, mesh: Any) -> None:
    model = fully_shard(Branches(), mesh=mesh["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compress_sharded(model, optimizer, mesh["machine"].get_group(), 0.5, fuse_below=0)
    before = model.sometimes.weight.full_tensor()
    x, y = batch(0, rank)
    (model(x, rank == 2) - y).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.sometimes.weight.full_tensor(), before)


def sparse_then_dense_settles_every_residual(rank: int, mesh: Any) -> None:
    run = Run(rank, mesh, DENSITY, SGD["momentum"]).train(range(3))
    pieces = run.state.pieces.values()
    assert any(piece.residual.v.any() for piece in pieces if piece.size > 1)
    run.state.density = Schedule(1.0)
    run.train(range(3, 5))
    assert all(piece.residual.settled and not piece.residual.v.any() for piece in pieces)


def shards_along_another_dimension_and_bf16_train_alike_on_all_machines(rank: int, mesh: Any) -> None:
    class Columns(Run):
        def shard(self, mesh: Any) -> None:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.model[4] = nn.Linear(33, 2)  # of even size, as torch wants it
            fully_shard(self.model, mesh=mesh, mp_policy=policy, shard_placement_fn=self.place)

        def place(self, parameter: nn.Parameter) -> Shard:
            return Shard(1 if parameter.dim() == 2 and parameter.shape[1] % SHARDS == 0 else 0)

    torch.manual_seed(rank)
    run = Columns(rank, mesh, DENSITY, SGD["momentum"])
    start = run.parameters()
    run.train(range(3))
    assert not equal(run.parameters(), start)
    assert_alike_on_all_ranks(run)


def assert_alike_on_all_ranks(run: Run) -> None:
    for mine in run.parameters():
        others = [torch.empty_like(mine) for _ in range(MACHINES * SHARDS)]
        torch.distributed.all_gather(others, mine)
        assert all(torch.equal(mine, other) for other in others)


def adamw_keeps_its_moments_with_plain_error_feedback(rank: int, mesh: Any) -> None:
    """It steps on the mean of what was sent, with a weight decay of its own. Tolerance: AdamW divides a gradient by its
    size, so a step has its relative error, and what is sent is the largest of its shard, where little cancels: STEPS
    steps of RATE and 60 roundings, 6 x 0.05 x 60 x 2^-24 = 1.1e-6. Without weight decay: more than 1e-4.
    """
    run = Run(rank, mesh, DENSITY, {}, optimizer=torch.optim.AdamW, momentum="optimizer").train(range(STEPS))
    assert all(piece.residual.u.numel() == 0 for piece in run.state.pieces.values())
    for ours, theirs in zip(run.parameters(), reference(DENSITY, {}, torch.optim.AdamW), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert_alike_on_all_ranks(run)
    with pytest.raises(ConfigError, match="optimizer AdamW: its first moment cannot be moved"):
        Run(rank, mesh, DENSITY, {}, optimizer=torch.optim.AdamW)


def what_cannot_be_right_is_refused(rank: int, mesh: Any) -> None:
    machines = mesh["machine"].get_group()

    def refused(match: str, model: nn.Module, **options: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with pytest.raises(ConfigError, match=match):
            compress_sharded(model, optimizer, machines, **options)  # type: ignore[arg-type]
        assert optimizer.param_groups[0]["momentum"] == 0.9

    refused("got a Sequential, wanted a model passed through fully_shard", net())
    refused("mesh of two dimensions, so torch sums between machines itself", fully_shard(net(), mesh=mesh))
    fp16 = MixedPrecisionPolicy(param_dtype=torch.float16)
    refused("gradients in float16", fully_shard(net(), mesh=mesh["shard"], mp_policy=fp16))
    mixed = net()
    fully_shard(mixed[2], mesh=mesh["shard"], offload_policy=CPUOffloadPolicy(pin_memory=False))
    refused("layer '2': parameters are offloaded to the CPU", fully_shard(mixed, mesh=mesh["shard"]))
    part = net()
    fully_shard(part[0], mesh=mesh["shard"])
    refused("got a Sequential", part)
    for warmup in (-0.1, 1.5, math.nan):
        refused(
            rf"compress.warmup: got {warmup}, wanted a share of", fully_shard(net(), mesh=mesh["shard"]), warmup=warmup
        )
    sharded = fully_shard(net(), mesh=mesh["shard"])
    for measuring in (Lanton(sharded), NoiseAdaptive(torch.optim.SGD(sharded.parameters()), sharded)):
        with pytest.raises(ConfigError, match=r"an optimizer that measures gradient noise .* needs whole grad"):
            compress_sharded(sharded, measuring, machines, momentum="optimizer")


def a_run_of_unknown_length_says_that_it_does_not_warm_up(rank: int, mesh: Any) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distrobust").addHandler(handler)
    Run(rank, mesh, DENSITY, {}, num_steps=10)
    Run(rank, mesh, DENSITY, {}, warmup=0.0)
    assert lines == []
    Run(rank, mesh, DENSITY, {})
    assert lines == ["compress: no warm-up, because the length of the run is unknown; pass num_steps="]


LAWS: list[Callable[[int, Any], None]] = [
    a_non_finite_gradient_on_one_rank_leaves_no_trace_on_any,
    a_backward_whose_gradients_are_thrown_away_leaves_no_trace,
    a_loaded_state_continues_bit_identically_and_another_place_is_refused,
    accumulated_batches_are_exchanged_once,
    a_parameter_used_on_one_rank_alone_is_updated_on_all,
    sparse_then_dense_settles_every_residual,
    shards_along_another_dimension_and_bf16_train_alike_on_all_machines,
    adamw_keeps_its_moments_with_plain_error_feedback,
    what_cannot_be_right_is_refused,
    a_run_of_unknown_length_says_that_it_does_not_warm_up,
]


def test_hybrid_sharding_equals_the_unsharded_reference_and_obeys_the_laws(tmp_path: Path) -> None:
    """Four processes are started once. Tolerance: STEPS steps of fewer than 60 roundings (dot products of up to 41) of
    numbers below 4 in u and v, times the rate and the momentum's 10: 6 x 60 x 4 x 2^-24 x 0.05 x 10 = 4.3e-5 at worst,
    as a random walk 2e-6. The smallest coordinate sent moves a parameter by more than 1e-4.
    """
    num_ranks = MACHINES * SHARDS
    with Processes(num_ranks, on_each_rank, tmp_path, collective_timeout_s=30) as processes:
        for density in (DENSITY, 1.0):
            for sgd in SGD.values():
                expected = reference(density, sgd)
                results = [processes.receive(rank, 120) for rank in range(num_ranks)]
                for _, _, parameters, sent_bytes in results:
                    assert equal(parameters, results[0][2])
                    assert sent_bytes > 0
                    for ours, theirs in zip(parameters, expected, strict=True):
                        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        for law in LAWS:
            assert [processes.receive(rank, 120) for rank in range(num_ranks)] == [law.__name__] * num_ranks
