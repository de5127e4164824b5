"""Everything `distrobust.compress` hands out: the residuals, one backward pass at a time, and what to save.

A pass is all buckets of one backward. Its buckets write next buffers and issue their collective as gradients become
ready; when the last one has been decoded the verdict is the same on every rank: either all residuals commit and the
means are handed to DDP, or (some rank had a non-finite gradient) none does, the gradients become NaN and the
optimizer's step is skipped. Futures of early buckets complete together with the last one; DDP waits for all anyway.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future
from torch.nn import Parameter

from distrobust.comm.dense import launch_dense
from distrobust.comm.exchange import Mean, Part, Settings, Step, launch_sparse
from distrobust.comm.flat import flat, flat_like, unflat
from distrobust.compression import codec
from distrobust.compression.memory import Residual, Rule
from distrobust.compression.select import num_selected
from distrobust.compression.warmup import Warmup
from distrobust.errors import CheckpointError, CommError, DistrobustError

_log = logging.getLogger(__name__)


@dataclass
class _Pass:
    """One backward pass: its buckets so far, and the future that all of them complete with."""

    step: Step
    dense: bool
    done: Future[Any]
    buckets: list[tuple[Tensor, list[Part]]] = field(default_factory=list)
    means: list[Future[Any]] = field(default_factory=list)
    finite: bool = True


class Compression:
    """State of the communication hook, keyed by parameter name. Made by `distrobust.compress`.

    `step`: optimizer steps seen, skipped ones included. `skipped`: the last backward met a non-finite gradient on some
    rank. `side`: what the observer returned, averaged over ranks, by parameter; `side_is_local` says of which gradient.
    `seconds`: host time spent in the hook so far, waiting excluded. `error`: why the last backward failed, if it did.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        rules: dict[str, Rule],
        settings: Settings,
        density: Warmup,
        *,
        fuse_below: int,
        scale: Callable[[], float] | None = None,
    ) -> None:
        self.settings = settings
        self.density = density
        self.parameters = parameters
        self.residuals = {
            name: Residual(parameter.numel(), rules[name], parameter.device) for name, parameter in parameters.items()
        }
        self._fused = {n: r for n, r in self.residuals.items() if r.v.numel() < fuse_below}
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._scale = scale
        self._pass: _Pass | None = None
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.dense_bytes = 0
        self.seconds = 0.0
        self.side: dict[str, float] = {}
        self.side_is_local = False
        self.error: Exception | None = None

    @property
    def skipped(self) -> bool:
        return self.skipped_in_a_row > 0

    @property
    def sent_bytes(self) -> int:
        """Bytes this rank has sent through the transport so far, everything included."""
        return self.settings.transport.sent_bytes

    def density_at(self, step: int) -> float:
        """Density of a step; 1.0 where sparse messages would be larger than a dense all-reduce."""
        density = self.density.at(step)
        n = sum(residual.v.numel() for residual in self.residuals.values())
        transport = self.settings.transport
        sparse = (transport.num_ranks - 1) * codec.num_bytes(n, num_selected(n, density), self.settings.code)
        worth_it = transport.num_ranks == 1 or sparse < transport.reduce_bytes(4 * n)
        return density if worth_it and density < 1.0 else 1.0

    def part(self, parameter: Tensor, start: int, gradient: Tensor) -> Part:
        """The piece of a bucket that belongs to `parameter`."""
        name = self._names[parameter]
        return Part(name, start, gradient, flat(parameter.detach()), self.residuals[name])

    def reduce(self, bucket: Tensor, parts: list[Part], is_first: bool, is_last: bool) -> Future[Any]:
        """Compresses and sends one bucket; the Future holds `bucket`, overwritten by the mean over ranks."""
        started = time.perf_counter()
        if is_first or self._pass is None:
            self._pass = self._begin(bucket.device)
        current = self._pass
        try:
            if current.dense:
                future = launch_dense(self.settings, current.step, bucket, parts)
            else:
                future, current.finite = launch_sparse(
                    self.settings, current.step, bucket, parts, is_last, current.finite
                )
        except Exception as error:
            self.error = error
            raise
        current.buckets.append((bucket, parts))
        current.means.append(future)
        if is_last:
            torch.futures.collect_all(current.means).then(lambda means: self._finish(current, means))
        self.seconds += time.perf_counter() - started

        def result(done: Future[Any]) -> Tensor:
            done.value()
            return bucket

        return current.done.then(result)

    def _begin(self, device: torch.device) -> _Pass:
        density = self.density_at(self.step)
        scale = 1.0 if self._scale is None else self._scale()
        fused = self._fused if density < 1.0 else {}
        self.error = None
        done: Future[Any] = Future(devices=[device] if device.type == "cuda" else None)
        return _Pass(Step(self.step, density, scale, fused), density == 1.0, done)

    def _finish(self, current: _Pass, means: Future[Any]) -> None:
        """Runs when every bucket is decoded, on whatever thread decoded the last."""
        started = time.perf_counter()
        try:
            decoded = [mean.value() for mean in means.value()]
            for mean in decoded:
                if mean.damaged is not None:
                    raise mean.damaged
            self._apply(current, decoded)
        except Exception as error:
            self.error = error
            current.done.set_exception(error)
            return
        self.seconds += time.perf_counter() - started
        current.done.set_result([bucket for bucket, _ in current.buckets])

    def _apply(self, current: _Pass, means: list[Mean]) -> None:
        self.step += 1
        self.dense_bytes += self.settings.transport.reduce_bytes(4 * sum(b.numel() for b, _ in current.buckets))
        if any(mean.flat is None for mean in means):
            for bucket, _ in current.buckets:
                bucket.fill_(math.nan)
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            _log.warning("step %d: non-finite gradient on some rank, step skipped on all", current.step.number)
            return
        self.skipped_in_a_row = 0
        fused = self._split_fused(current, means)
        self.side, self.side_is_local = {}, means[0].side_is_local
        for (bucket, parts), mean in zip(current.buckets, means, strict=True):
            assert mean.flat is not None
            self.side.update(mean.side)
            for part in parts:
                if part.name in fused:
                    mean.flat[part.start : part.end] = fused[part.name]
                if mean.used[part.name]:
                    part.residual.commit(settled=current.dense)
                else:  # DDP will drop the answer for a parameter nobody used: leave it in the residual
                    mean.flat[part.start : part.end] = 0.0
            bucket.copy_(mean.flat if current.step.scale == 1.0 else mean.flat * current.step.scale)
        if self.settings.observer is not None and self.side:
            self.settings.observer.commit()

    def _split_fused(self, current: _Pass, means: list[Mean]) -> dict[str, Tensor]:
        joined = means[-1].fused
        if joined is None:
            return {}
        sizes = [residual.v.numel() for residual in current.step.fused.values()]
        return dict(zip(current.step.fused, joined.split(sizes), strict=True))

    def drop_gradients_if_skipped(self) -> None:
        """Leaves the optimizer nothing to step on after a skipped backward; a hook on its step calls this."""
        if self.skipped:
            for parameter in self.parameters.values():
                parameter.grad = None

    def residual_norm_ratio(self) -> float:
        """||v|| over all parameters divided by the norm of the mean just applied (the parameters' .grad)."""
        kept = sum(float(torch.linalg.vector_norm(r.v)) ** 2 for r in self.residuals.values())
        applied = sum(
            float(torch.linalg.vector_norm(p.grad)) ** 2 for p in self.parameters.values() if p.grad is not None
        )
        return math.sqrt(kept / applied) if applied > 0 and math.isfinite(applied) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Residuals in the parameters' own shapes: memory format and buckets may differ when they are loaded."""
        residuals = {}
        for name, residual in self.residuals.items():
            shaped = {"v": unflat(residual.v, self.parameters[name])}
            if residual.u.numel():
                shaped["u"] = unflat(residual.u, self.parameters[name])
            residuals[name] = {**shaped, "settled": residual.settled}
        transport = self.settings.transport
        return {
            "residuals": residuals,
            "step": self.step,
            "rank": transport.rank,
            "num_ranks": transport.num_ranks,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "sent_bytes": transport.sent_bytes,
            "dense_bytes": self.dense_bytes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the same rank's `state_dict()`; CheckpointError, changing nothing, if it does not fit."""
        if "residuals" not in state:
            raise CheckpointError("this is not what Compression.state_dict() returned: it holds no 'residuals'")
        transport = self.settings.transport
        place = (state["rank"], state["num_ranks"])
        if place != (transport.rank, transport.num_ranks):
            raise CheckpointError(
                f"residual of rank {place[0]} of {place[1]}, this is rank {transport.rank} of {transport.num_ranks}: "
                "continue with the same number of workers"
            )
        saved = state["residuals"]
        differing = sorted(set(saved) ^ set(self.residuals))
        if differing:
            raise CheckpointError(
                f"residuals of another model: {len(differing)} parameters differ, first {differing[0]!r}"
            )
        for name, entry in saved.items():
            if entry["v"].shape != self.parameters[name].shape:
                raise CheckpointError(
                    f"residual of {name!r}: got shape {tuple(entry['v'].shape)}, "
                    f"wanted {tuple(self.parameters[name].shape)}"
                )
            if ("u" in entry) != bool(self.residuals[name].rule.momentum):
                with_or_without = ("with", "without") if "u" in entry else ("without", "with")
                raise CheckpointError(
                    "residual of {!r}: saved {} momentum, this run is {} it".format(name, *with_or_without)
                )
        for name, entry in saved.items():
            u = flat_like(entry["u"], self.parameters[name]) if "u" in entry else torch.zeros(0)
            self.residuals[name].load(u, flat_like(entry["v"], self.parameters[name]), entry["settled"])
        self.step = state["step"]
        self.skipped_steps = state["skipped_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        transport.sent_bytes = state["sent_bytes"]
        self.dense_bytes = state["dense_bytes"]

    def raise_cause(self) -> None:
        """After a backward() that raised: raises the exchange's error with its own type, if it was the exchange's."""
        if isinstance(self.error, DistrobustError):
            raise self.error
        if self.error is not None:
            raise CommError(f"step {self.step}: {self.settings.transport.explain(self.error)}") from self.error
