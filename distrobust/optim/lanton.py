"""LANTON, the optimizer: norm-constrained updates at rates that follow each layer's gradient noise.

Hao et al., 2025, arXiv 2510.14009, algorithm 1. Letters: B momentum, G gradient, O direction, X parameter, H noise, eta
the learning rate, b1 momentum, b2 beta2; norms and directions in norms.py, H in noise.py, the ratio in rates.py:

    B <- b1 B + (1 - b1) G
    O <- argmax <B, O> over ||O|| <= 1
    H <- b2 H + (1 - b2) ||G - G~||_*^2
    a <- alpha / sqrt(alpha^2 + H)
    X <- (1 - eta r w) X - eta r O,    r = sqrt(a / a_max), w weight decay

A parameter group is a group of the paper: one norm, one a_max. Differences from the paper: weight decay is decoupled
and goes with the layer's own rate; U V^T by better coefficients; G~ may be measured as in noise.py, and every fourth
step, with b2^4 (a nuclear norm costs more than a direction: every step, 11 % of the step of a small GPT on a CPU); H of
a layer whose gradients are missing stays.

Every rank computes the same update only if its matrix products round the same: the same kind of processor and of torch
on all of them, as with Muon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrobust.errors import ConfigError
from distrobust.optim import norms
from distrobust.optim.groups import describe, log, norms_of, refuse_unservable
from distrobust.optim.noise import IndependentNoise, Noise, SpreadNoise, TemporalNoise
from distrobust.optim.rates import check_alpha, rate_ratios

NOISES = ("previous", "independent", "none")


class Lanton(Optimizer):
    """params: a model, whose parameters are put into groups by `norms_of` (logged once; `overrides` as there), or torch
    parameter groups, each with a "norm".

    lr: how far the quietest layer of a group moves, in its norm. momentum b1, beta2 b2, alpha: see the module. noise:
    "previous" (the paper's option 1), "independent" (option 2; see `keep_independent`) or "none" (ratios of 1).
    noise_every: steps from one measurement of "previous" to the next; 1 is the paper's.
    Parameters may be of any floating dtype; momentum and noise are float32. Raises ConfigError for what has no norm.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 0.01,
        *,
        momentum: float = 0.95,
        beta2: float = 0.9,
        alpha: float = 0.1,
        weight_decay: float = 0.0,
        noise: str = "previous",
        noise_every: int = 4,
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        _check(lr=lr, momentum=momentum, weight_decay=weight_decay)
        check_alpha(alpha)
        if noise not in NOISES:
            raise ConfigError(f"Lanton noise: got {noise!r}, wanted one of {', '.join(NOISES)}")
        defaults = {"lr": lr, "momentum": momentum, "alpha": alpha, "weight_decay": weight_decay, "norm": None}
        super().__init__(_groups_of(params, overrides) if isinstance(params, nn.Module) else params, defaults)
        named: dict[str, Tensor] = {}
        by_name: dict[str, norms.Norm] = {}
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
            group["names"] = names
            for name, parameter in zip(names, group["params"], strict=True):
                refuse_unservable(name, parameter)
                norm = group["norm"]
                if norm not in norms.NORMS:
                    raise ConfigError(
                        f"Lanton, group {number}: got norm {norm!r}, wanted one of {', '.join(norms.NORMS)}; or pass "
                        "the model instead of its parameters"
                    )
                named[name], by_name[name] = parameter, norm
        self.noise: Noise | None = None
        if noise == "previous":
            self.noise = TemporalNoise(named, by_name, beta2, noise_every)
        elif noise == "independent":
            self.noise = IndependentNoise(named, by_name, beta2)
        self._is_observed = False  # an exchange measures the noise, before it compresses
        self.ratios = {name: torch.ones(()) for name in named}

    def observer_for(self, num_ranks: int, always_dense: bool) -> Noise | None:
        """What an exchange shall call on every gradient; from here on `step` measures nothing by itself.

        Workers' spread where their mean is known in every step; otherwise each one's own successive gradients.
        """
        if isinstance(self.noise, IndependentNoise):
            raise ConfigError(
                "Lanton noise='independent' under compression: nobody knows the mean of the second gradient"
            )
        if self.noise is not None:
            kind = SpreadNoise if num_ranks > 1 and always_dense else TemporalNoise
            self.noise = kind(self.noise.parameters, self.noise.norms, self.noise.beta2)
            log(f"Lanton: noise from {_SOURCES[type(self.noise), num_ranks > 1]}")
            self._is_observed = True
        return self.noise

    def keep_independent(self) -> None:
        """Takes the gradients there are as G~ and clears them: same weights, samples that the step will not see."""
        if not isinstance(self.noise, IndependentNoise):
            raise ConfigError("Lanton.keep_independent: wanted noise='independent'")
        self.noise.keep(self._gradients())
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self._gradients()
        if isinstance(self.noise, TemporalNoise) and not self._is_observed:
            self.noise.measure(gradients)
        for group in self.param_groups:
            self._step_group(group, gradients)
        return loss

    def _step_group(self, group: dict[str, Any], gradients: Mapping[str, Tensor]) -> None:
        pairs = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if n in gradients]
        if not pairs:
            return
        names, parameters = [n for n, _ in pairs], [p for _, p in pairs]
        buffers = [self._buffer(p) for p in parameters]
        grads = [gradients[name].to(torch.float32) for name in names]
        torch._foreach_lerp_(buffers, grads, 1.0 - group["momentum"])
        steps = norms.directions(group["norm"], buffers)
        ratios = self._ratios(group)
        self.ratios.update(ratios)
        rates = [group["lr"] * ratios[name] for name in names]
        if group["weight_decay"]:
            kept = [1.0 - rate * group["weight_decay"] for rate in rates]
            torch._foreach_mul_(parameters, [k.to(p.dtype) for k, p in zip(kept, parameters, strict=True)])
        torch._foreach_mul_(steps, rates)
        torch._foreach_sub_(parameters, steps)

    def _ratios(self, group: dict[str, Any]) -> dict[str, Tensor]:
        """sqrt(a / a_max) of the group's layers, float32 scalars on the parameters' device."""
        names = group["names"]
        if self.noise is None:
            return {name: torch.ones((), device=group["params"][0].device) for name in names}
        h = self.noise.of(names)
        ratios = rate_ratios(h, torch.zeros_like(h, dtype=torch.int64), group["alpha"])
        return dict(zip(names, ratios.to(torch.float32).unbind(), strict=True))

    def _gradients(self) -> dict[str, Tensor]:
        found = {}
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                if parameter.grad.layout is not torch.strided:
                    raise ConfigError(
                        f"Lanton: the gradient of {name!r} is {parameter.grad.layout}, wanted a dense one; make the "
                        "embedding with sparse=False"
                    )
                found[name] = parameter.grad
        return found

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def state_dict(self) -> dict[str, Any]:
        noise = None if self.noise is None else self.noise.state_dict()
        return {**super().state_dict(), "noise": noise}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        noise = state_dict["noise"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "noise"})
        for i, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            if i in state_dict["state"]:  # torch casts to the parameter's dtype
                buffer = state_dict["state"][i]["momentum_buffer"]
                self.state[parameter]["momentum_buffer"] = buffer.to(parameter.device, torch.float32, copy=True)
        if self.noise is not None and noise is not None:
            self.noise.load_state_dict(noise)


_SOURCES = {
    (SpreadNoise, True): "the spread of workers' gradients",
    (TemporalNoise, True): "each worker's successive gradients, since under compression nobody knows their mean",
    (TemporalNoise, False): "successive gradients, since there is one worker",
}


def _groups_of(model: nn.Module, overrides: Mapping[str, str] | None) -> list[dict[str, Any]]:
    chosen = norms_of(model, overrides)
    log(f"Lanton: {describe(chosen, model)}")
    parameters = dict(model.named_parameters())
    return [
        {"params": [(name, parameters[name]) for name in chosen if chosen[name] == norm], "norm": norm}
        for norm in norms.NORMS
        if norm in chosen.values()
    ]


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        below = 1.0 if name == "momentum" else math.inf
        if not 0.0 <= value < below:
            raise ConfigError(f"Lanton {name}: got {value}, wanted a number from 0 to below {below:g}")
