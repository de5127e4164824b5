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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future
from torch.nn import Parameter

from distrobust.comm import dense, saved
from distrobust.comm.ahead import StepAhead
from distrobust.comm.bucket import Bucket, Exchange, Mean, Settings, Step, Verdict
from distrobust.comm.exchange import EXCHANGES
from distrobust.comm.flat import flat
from distrobust.comm.hierarchical import hierarchical, piece_size
from distrobust.comm.job import Job
from distrobust.comm.line import Part
from distrobust.compression import codec
from distrobust.compression.density import Schedule
from distrobust.compression.memory import Residual, Rule
from distrobust.compression.message import Layout
from distrobust.compression.select import num_selected
from distrobust.errors import CheckpointError, CommError, ConfigError, DistrobustError

_log = logging.getLogger(__name__)


@dataclass
class _Pass:
    """One backward pass: its buckets so far, and the future that all of them complete with."""

    step: Step
    dense: bool
    done: Future[Any]
    jobs: list[Job] = field(default_factory=list)
    verdict: Verdict = field(default_factory=Verdict)


class Compression:
    """State of the communication hook, keyed by parameter name. Made by `distrobust.compress`.

    `step`: optimizer steps seen, skipped ones included. `skipped`: the last backward met a non-finite gradient on some
    rank. `seconds`: host time spent in the hook so far, without waiting and decoding; `decode_seconds`: on what came
    back, buckets that are decoded at the same time added up. `handed_over_at`: when the last bucket of the last
    backward was issued, by time.perf_counter. `error`: why that backward failed.
    """

    def __init__(
        self,
        parameters: dict[str, Parameter],
        rules: dict[str, Rule],
        settings: Settings,
        density: Schedule,
        *,
        fuse_below: int,
        scale: Callable[[], float] | None = None,
        rates: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.settings = settings
        self.density = density
        self.parameters = parameters
        num_local = settings.transport.local.num_ranks if settings.transport.local else 1
        self.residuals = {
            name: Residual(piece_size(parameter.numel(), num_local), rules[name], parameter.device)
            for name, parameter in parameters.items()
        }
        self._fused = {n: self.residuals[n] for n, p in parameters.items() if p.numel() < fuse_below}
        num_ranks = settings.transport.num_ranks
        self.ahead = StepAhead(parameters, self.residuals, num_ranks, rates) if rates is not None else None
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        self._scale = scale
        self._pass: _Pass | None = None
        self._stays_ahead = False
        self.measured_for: float | None = None  # exchange_s: the density is what the link allowed at the start
        self._pays: dict[float, bool] = {}  # by density: whether sparse messages are smaller than dense ones
        self._is_unspent = False  # the last mean was handed over and no optimizer has made a step since
        self.step = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.dense_bytes = 0
        self.seconds = 0.0
        self.handed_over_at = 0.0
        self.decode_seconds = 0.0
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
        if density not in self._pays:
            alone = self.settings.transport.num_ranks == 1
            self._pays[density] = density < 1.0 and (alone or self.step_bytes(density) < self.step_bytes(1.0))
            if density < 1.0 and not self._pays[density]:
                _log.info("compress: dense at density %.4g: sparse messages would be larger", density)
        return density if self._pays[density] else 1.0

    def step_bytes(self, density: float) -> int:
        """What this rank sends in a step at a density if DDP has one bucket; each further one adds a small header."""
        sizes = {name: residual.v.numel() for name, residual in self.residuals.items()}
        n, num_ranks = sum(sizes.values()), self.settings.transport.num_ranks
        if density == 1.0:
            return self.settings.transport.reduce_bytes(4 * n)
        units = [size for name, size in sizes.items() if name not in self._fused]
        units += [n - sum(units)] if self._fused else []
        space = codec.Space(n, tuple(num_selected(size, density) for size in units))
        messages = num_ranks - 1 if self.settings.exchange == "all_gather" else 2 * (num_ranks - 1) / num_ranks
        num_side = len(sizes) * self.settings.observer.width if self.settings.observer is not None else 0
        return round(messages * Layout(space, self.settings.code, len(sizes), num_side).num_bytes)

    def part(self, parameter: Tensor, start: int, gradient: Tensor) -> Part:
        """The piece of a bucket that belongs to `parameter`."""
        name = self._names[parameter]
        return Part(name, start, gradient, flat(parameter.detach()), self.residuals[name])

    def reduce(self, bucket: Tensor, parts: list[Part], is_first: bool, is_last: bool) -> Future[Any]:
        """Compresses and sends one bucket; the Future holds `bucket`, overwritten by the mean over ranks.

        Exchanges of several hops go on here too, since a hop must not be issued in the callback of another: every
        bucket takes those before it one hop further, and the last one takes all to their last hop.
        """
        started = time.perf_counter()
        if is_first or self._pass is None:
            self._pass = self._begin(bucket.device)
        current = self._pass
        exchange, num_hops = self._exchange(current.dense, parts)
        try:
            self._advance(current)
            given = Bucket(bucket, parts, is_last)
            made = exchange(self.settings, current.step, given, current.verdict)
            current.jobs.append(Job(given, made, num_hops, self.settings.transport))
            self.handed_over_at = time.perf_counter()
            while is_last and self._advance(current):
                pass
        except Exception as error:
            self.error = error
            raise
        if is_last:
            torch.futures.collect_all([job.done for job in current.jobs]).then(lambda _: self._finish(current))
        self.seconds += time.perf_counter() - started

        def result(done: Future[Any]) -> Tensor:
            done.value()
            return bucket

        return current.done.then(result)

    def _exchange(
        self, is_dense: bool, parts: list[Part]
    ) -> tuple[Callable[[Settings, Step, Bucket, Verdict], Exchange], int]:
        """What carries a bucket, and in how many hops."""
        exchange, num_hops = EXCHANGES[self.settings.exchange]
        if is_dense:
            exchange, num_hops = dense.dense, dense.num_hops(self.settings, parts)
        if self.settings.transport.local:
            return partial(hierarchical, exchange), num_hops + 2
        return exchange, num_hops

    def _advance(self, current: _Pass) -> bool:
        """Takes every exchange that has hops left one further; False if none has."""
        if self.settings.transport.chains:
            return False
        waiting = [job for job in current.jobs if job.hops_left]
        for job in waiting:
            started = time.perf_counter()
            job.wait()
            self.seconds -= time.perf_counter() - started  # not the hook's own work
            job.advance()
        return bool(waiting)

    def _begin(self, device: torch.device) -> _Pass:
        density = self.density_at(self.step)
        scale = 1.0 if self._scale is None else self._scale()
        fused = self._fused if density < 1.0 else {}
        self.error = None
        done: Future[Any] = Future(devices=[device] if device.type == "cuda" else None)
        step = Step(self.step, density, scale, fused, {name: self.parameters[name].numel() for name in fused})
        return _Pass(step, density == 1.0, done)

    def _finish(self, current: _Pass) -> None:
        """Runs when every bucket is decoded, on whatever thread decoded the last."""
        try:
            if not self._stays_ahead:
                self.step_back()
            for job in current.jobs:
                if job.error is not None:
                    raise job.error
            started = time.perf_counter()
            self._apply(current)
            self.decode_seconds += sum(job.decode_s for job in current.jobs) + time.perf_counter() - started
        except Exception as error:
            self.error = error
            current.done.set_exception(error)
            return
        current.done.set_result([job.bucket.flat for job in current.jobs])

    def _apply(self, current: _Pass) -> None:
        self.step += 1
        self.dense_bytes += self.settings.transport.reduce_bytes(4 * sum(j.bucket.flat.numel() for j in current.jobs))
        results = [(job.bucket, job.mean) for job in current.jobs if job.mean is not None]
        if not all(mean.finite for _, mean in results):
            for bucket, _ in results:
                bucket.flat.fill_(math.nan)
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            _log.warning("step %d: non-finite gradient on some rank, step skipped on all", current.step.number)
            return
        self.skipped_in_a_row = 0
        self._is_unspent = True
        scale = current.step.scale
        fused = self._split_fused(current, results[-1][1])
        for bucket, mean in results:
            mean.write(bucket.flat, scale)
            for part in bucket.parts:
                here = bucket.flat[part.start : part.end]
                if part.name in fused:
                    here.copy_(fused[part.name] if scale == 1.0 else fused[part.name] * scale)
                if mean.used[part.name]:
                    part.residual.commit(settled=current.dense)
                else:  # DDP will drop the answer for a parameter nobody used: leave it in the residual
                    here.zero_()
        if self.settings.observer is not None:
            rows = {name: row for _, mean in results for name, row in mean.side.items() if mean.used[name]}
            self.settings.observer.commit(rows, results[0][1].side_is_local)

    def _split_fused(self, current: _Pass, last: Mean) -> dict[str, Tensor]:
        joined = last.fused
        if joined is None:
            return {}
        sizes = list(current.step.num_fused.values())
        return dict(zip(current.step.fused, joined.split(sizes), strict=True))

    def step_ahead(self) -> None:
        """Moves the parameters to where the next gradient is computed; the end of backward() moves them back.

        The wrapper's forward in training mode does it by itself; call it earlier if something else should see them
        there.
        """
        if self.ahead is not None:
            self.ahead.go()

    def step_back(self) -> None:
        """Moves the parameters back to the shared ones."""
        if self.ahead is not None:
            self.ahead.back()

    @contextmanager
    def staying_ahead(self) -> Iterator[None]:
        """Inside, backward() leaves the parameters where step_ahead() moved them; the end of the block moves them back.

        For what restores parameters after a backward, as perturbations of weights do: they would restore them there.
        """
        self._stays_ahead = True
        try:
            yield
        finally:
            self._stays_ahead = False
            self.step_back()

    def drop_gradients_if_skipped(self) -> None:
        """Leaves the optimizer nothing to step on after a skipped backward; a hook on its step calls this."""
        if self.skipped:
            for parameter in self.parameters.values():
                parameter.grad = None

    def spend(self) -> None:
        """An optimizer steps on the gradients; a hook on its step calls this."""
        self._is_unspent = False

    def refuse_unspent_gradients(self) -> None:
        """Raises ConfigError if the next backward would add to a mean that has been exchanged; forward calls this.

        The hook would be handed that sum as one gradient, and momentum act on the mean twice. Gradients that are not
        finite are those of a step a GradScaler skipped, and the exchange will drop them too.
        """
        if not self._is_unspent:
            return
        left = sum(float(p.grad.abs().sum(dtype=torch.float32)) for p in self.parameters.values() if p.grad is not None)
        if 0.0 < left < math.inf:
            raise ConfigError(
                "compress: the gradients of the last backward() are neither stepped on nor cleared, and the next one "
                "would exchange them again: accumulate under `with model.no_sync():` for all but the last micro-batch, "
                "or call zero_grad() before the forward"
            )
        self._is_unspent = False

    def residual_norm_ratio(self) -> float:
        """||v|| over all parameters divided by the norm of the mean just applied (the parameters' .grad)."""
        kept = sum(float(torch.linalg.vector_norm(r.v)) ** 2 for r in self.residuals.values())
        applied = sum(
            float(torch.linalg.vector_norm(p.grad)) ** 2 for p in self.parameters.values() if p.grad is not None
        )
        return math.sqrt(kept / applied) if applied > 0 and math.isfinite(applied) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Residuals in the parameters' own shapes: memory format and buckets may differ when they are loaded."""
        self.step_back()  # whoever saves this saves the parameters too
        transport = self.settings.transport
        return {
            **saved.save(self.residuals, self._shapes),
            "density": (self.density.density, *self._measured) if self.measured_for else None,
            "step": self.step,
            "rank": transport.rank,
            "num_ranks": transport.num_ranks,
            "num_local": transport.local.num_ranks if transport.local else 1,
            "local_rank": transport.local.rank if transport.local else 0,
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
                "hand the states of all ranks to distrobust.resize() first"
            )
        local = (transport.local.rank, transport.local.num_ranks) if transport.local else (0, 1)
        if (state["local_rank"], state["num_local"]) != local:
            raise CheckpointError(
                f"residual of local rank {state['local_rank']} of {state['num_local']}, here {local[0]} of {local[1]}: "
                "continue a hierarchical exchange with the same workers on each machine"
            )
        saved.load(state, self.residuals, self._shapes)
        found = state.get("density")
        if self.measured_for and found and tuple(found[1:]) == self._measured:
            self.density = replace(self.density, density=found[0])
            self._pays.clear()
        self.step = state["step"]
        self.skipped_steps = state["skipped_steps"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        transport.sent_bytes = state["sent_bytes"]
        self.dense_bytes = state["dense_bytes"]

    @property
    def _measured(self) -> tuple[float | None, int]:
        """What a measured density holds for: with another budget, or resized, it is measured anew."""
        return (self.measured_for, self.settings.transport.num_ranks)

    @property
    def _shapes(self) -> dict[str, Parameter]:
        """Parameters whose residuals are whole."""
        return {} if self.settings.transport.local else self.parameters

    def raise_cause(self) -> None:
        """After a backward() that raised: raises the exchange's error with its own type, if it was the exchange's."""
        if isinstance(self.error, DistrobustError):
            raise self.error
        if self.error is not None:
            raise CommError(f"step {self.step}: {self.settings.transport.explain(self.error)}") from self.error
