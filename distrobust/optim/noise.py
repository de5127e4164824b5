"""Gradient noise of every parameter: three estimators of one quantity.

LANTON (Hao et al., 2025, arXiv 2510.14009), algorithm 1, averages over time

    H_t = b2 H_{t-1} + (1 - b2) ||G_t - G~_t||_*^2

with G the gradient averaged over N workers and G~ another one. So H estimates the expected squared difference of two
independent gradients, twice the noise of one. Where G~ comes from:

    TemporalNoise     option 1: the previous step's gradient. Contains what the step changed, and waits a step.
    IndependentNoise  option 2: a second gradient at the same weights, from other samples. Costs a backward pass.
    SpreadNoise       ours: workers' gradients are independent at the same weights, so with their mean m
                          2 / N * sum_r ||g_r - m||_*^2 / (N - 1)
                      is H without waiting, drift or a second pass; needs two workers.

A dense exchange knows m, and SpreadNoise is exact. Under compression nobody knows m: every worker sends a random
projection of its gradient inside its message, a few numbers for each parameter, and their spread is that of the
gradients on average (projection.py). Relative standard deviation of one step's sum over N workers with M numbers each
and noise without a preferred direction: sqrt(2 / (M (N - 1))); cost: 4 M bytes a parameter. This holds for the
Frobenius norm only; for other norms TemporalNoise measures each worker's own gradients, averages, and divides by N.

Workers get each other's numbers in the same messages, so H is the same on every rank, to the bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distrobust.errors import ConfigError
from distrobust.optim.norms import Norm, dual_norms
from distrobust.optim.projection import Projection


class Noise(ABC):
    """H by parameter. `width`: float32 numbers a parameter in a message. `wants_mean`: see `compare`.

    As an observer of an exchange: `observe` every gradient, or `compare` it in a step that `is_due`; `commit` if the
    step happens. every: norms are taken in one of so many steps, and averaged over as many:
    H <- b2^every H + (1 - b2^every) ...; what `observe` finds in the others is NaN, and says nothing.
    """

    width = 1
    wants_mean = False

    def __init__(
        self, parameters: Mapping[str, Tensor], norms: Mapping[str, Norm], beta2: float, every: int = 1
    ) -> None:
        if not 0.0 <= beta2 < 1.0:
            raise ConfigError(f"noise.beta2: got {beta2}, wanted a number from 0 to below 1")
        if every < 1:
            raise ConfigError(f"noise_every: got {every}, wanted a number of steps, 1 or more")
        self.parameters, self.norms, self.beta2 = parameters, norms, beta2
        self.every, self._since = every, 0
        self.names = list(parameters)
        self._place = {name: i for i, name in enumerate(self.names)}
        device = next(iter(parameters.values())).device
        self.h = torch.full((len(self.names),), math.nan, dtype=torch.float64, device=device)

    def by_name(self) -> dict[str, float]:
        """H of every parameter that was measured."""
        return {name: h for name, h in zip(self.names, self.h.tolist(), strict=True) if not math.isnan(h)}

    def of(self, names: Sequence[str]) -> Tensor:
        """(len(names),) float64: H, NaN where nothing was measured yet, or nothing is known of the parameter."""
        padded = torch.nn.functional.pad(self.h, (0, 1), value=math.nan)
        return padded[torch.tensor([self._place.get(name, -1) for name in names], device=self.h.device)]

    def continue_from(self, other: Noise) -> None:
        """Takes the H that another estimator had of the same parameters, whatever their names there."""
        known = {id(p): h for p, h in zip(other.parameters.values(), other.h.tolist(), strict=True)}
        found = [known.get(id(p), math.nan) for p in self.parameters.values()]
        self.h.copy_(torch.tensor(found, dtype=torch.float64))

    @abstractmethod
    def observe(self, name: str, gradient: Tensor) -> Tensor:
        """(width,) float32 to send, of a gradient (n,) or of the parameter's shape: a worker's own, or the mean."""

    def compare(self, name: str, gradient: Tensor, mean: Tensor) -> Tensor:
        """(1,) float32 ||gradient - mean||_*^2 to send, of a worker's own (n,) and the mean, where that is wanted."""
        difference = self._shaped(gradient.to(torch.float32) - mean.to(torch.float32), name)
        return self._squares({name: difference})[name].float().view(1)

    @abstractmethod
    def commit(self, rows: Mapping[str, Tensor], is_local: bool) -> None:
        """The step happens. rows: (num_ranks, numbers), what every rank observed (`is_local`), or all of the mean."""

    @property
    def is_due(self) -> bool:
        """The step under way measures."""
        return self._since + 1 >= self.every

    def _count(self) -> None:
        """A step happened."""
        self._since = 0 if self.is_due else self._since + 1

    def take(self, squares: Mapping[str, Tensor], beta2: float) -> None:
        """Takes squared dual norms of differences into H; what is not finite says nothing."""
        if not squares:
            return
        places = torch.tensor([self._place[name] for name in squares], device=self.h.device)
        new = torch.stack([square.reshape(()) for square in squares.values()]).to(self.h)
        old = self.h[places]
        averaged = torch.where(torch.isnan(old), new, beta2 * old + (1.0 - beta2) * new)
        self.h[places] = torch.where(torch.isfinite(new), averaged, old)

    def state_dict(self) -> dict[str, Any]:
        return {"h": dict(zip(self.names, self.h.tolist(), strict=True)), "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also of another estimator, which a run with one worker had: H is the same quantity."""
        known = state["h"]
        self.h.copy_(torch.tensor([known.get(name, math.nan) for name in self.names], dtype=torch.float64))
        self._since = state.get("since", 0)

    def _squares(self, differences: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Squared dual norms, of tensors in their parameter's shape."""
        found: dict[str, Tensor] = {}
        for norm in sorted({self.norms[name] for name in differences}):
            names = [name for name in differences if self.norms[name] == norm]
            duals = dual_norms(norm, [differences[name] for name in names])
            found.update(zip(names, duals.double().square().unbind(), strict=True))
        return found

    def _shaped(self, values: Tensor, name: str) -> Tensor:
        """Flat values are in the order of the parameter's storage, where that has no gaps."""
        parameter = self.parameters[name]
        if values.shape == parameter.shape:
            return values
        if torch.ops.aten.is_non_overlapping_and_dense(parameter):
            return values.as_strided(parameter.shape, parameter.stride(), values.storage_offset())
        return values.view(parameter.shape)


class TemporalNoise(Noise):
    """Option 1: against the previous step's gradient. Keeps a copy of it, two while an exchange is under way."""

    def __init__(
        self, parameters: Mapping[str, Tensor], norms: Mapping[str, Norm], beta2: float, every: int = 1
    ) -> None:
        super().__init__(parameters, norms, beta2, every)
        self._previous: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}
        self._was_local: bool | None = None

    @property
    def _is_last_before(self) -> bool:
        """The next step measures, and needs this one's gradients."""
        return self.every == 1 or self._since + 2 == self.every

    def observe(self, name: str, gradient: Tensor) -> Tensor:
        """||gradient - previous||_*^2; NaN when there is no previous one."""
        found = torch.full((1,), math.nan, device=gradient.device)
        current = self._shaped(gradient.detach(), name)
        if self.is_due and name in self._previous:
            difference = current.to(torch.float32) - self._previous[name]
            found = self._squares({name: difference})[name].to(torch.float32).view(1)
        if self._is_last_before:
            self._current[name] = current.to(torch.float32, copy=True)
        return found

    def commit(self, rows: Mapping[str, Tensor], is_local: bool) -> None:
        """The first difference after gradients changed from local to mean, or back, says nothing."""
        self._previous.update({name: self._current[name] for name in rows if name in self._current})
        self._current = {}
        if not rows:  # an exchange that settled residuals: nobody saw a gradient
            return
        self._count()
        switched = self._was_local not in (None, is_local)
        self._was_local = is_local
        if not switched:
            squares = {name: row.double().mean() / (len(row) if is_local else 1) for name, row in rows.items()}
            self.take(squares, self.beta2**self.every)

    def measure(self, gradients: Mapping[str, Tensor]) -> None:
        """All of a step's gradients at once, in their parameters' shapes, by an optimizer about to apply them: means,
        which are not compared with what an exchange kept of local ones."""
        if self.is_due and not self._was_local:
            self._compare(gradients)
        self._was_local = False
        if self._is_last_before:
            self.keep(gradients)
        self._count()

    def _compare(self, gradients: Mapping[str, Tensor]) -> None:
        known = [name for name in gradients if name in self._previous]
        new = [gradients[name].detach().to(torch.float32) for name in known]
        if known:
            differences = torch._foreach_sub(new, [self._previous[name] for name in known])
            self.take(self._squares(dict(zip(known, differences, strict=True))), self.beta2**self.every)

    def keep(self, gradients: Mapping[str, Tensor]) -> None:
        """The gradients to compare the next ones with."""
        for name, gradient in gradients.items():
            if name in self._previous:
                self._previous[name].copy_(gradient.detach())
            else:
                self._previous[name] = gradient.detach().to(torch.float32, copy=True)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "previous": dict(self._previous),
            "was_local": self._was_local,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        previous = {name: kept for name, kept in state.get("previous", {}).items() if name in self.parameters}
        device = self.h.device
        self._previous = {name: kept.to(device, torch.float32, copy=True) for name, kept in previous.items()}
        self._was_local, self._current = state.get("was_local"), {}


class IndependentNoise(TemporalNoise):
    """Option 2: against gradients handed to `keep` in the same step; a step without measures nothing."""

    def measure(self, gradients: Mapping[str, Tensor]) -> None:
        super().measure(gradients)
        self._previous = {}


class SpreadNoise(Noise):
    """The spread of workers' gradients at the same weights. `width` numbers a parameter travel under compression, where
    every step measures."""

    wants_mean = True

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        norms: Mapping[str, Norm],
        beta2: float,
        width: int = 4,
        every: int = 1,
    ) -> None:
        super().__init__(parameters, norms, beta2, every)
        self.width = width
        self._projection = Projection(width)
        self._step = 0

    def observe(self, name: str, gradient: Tensor) -> Tensor:
        """A projection with the signs of this step, the same on every rank."""
        return self._projection(gradient.detach().to(torch.float32).reshape(-1), self._step)

    def commit(self, rows: Mapping[str, Tensor], is_local: bool) -> None:
        self._step += 1
        self._count()
        squares = {}
        for name, row in rows.items():
            num_ranks = len(row)
            deviations = (row - row.mean(dim=0)).double().square() if is_local else row.double()
            squares[name] = 2.0 / num_ranks * deviations.sum() / (num_ranks - 1)
        self.take(squares, self.beta2 if is_local else self.beta2**self.every)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._step = state.get("step", 0)
