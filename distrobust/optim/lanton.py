"""LANTON, the optimizer: norm-constrained updates at rates that follow each layer's gradient noise.

Hao et al., 2025, arXiv 2510.14009, algorithm 1. Letters: B momentum, G gradient, O direction, X parameter, H noise, eta
the learning rate, b1 momentum, b2 beta2; norms and directions in norms.py, H in noise.py, the ratio in rates.py:

    B <- b1 B + (1 - b1) G
    O <- argmax <B, O> over ||O|| <= 1
    H <- b2 H + (1 - b2) ||G - G~||_*^2
    a <- alpha / sqrt(alpha^2 + H)
    X <- (1 - eta r w) X - eta r s O,    r = sqrt(a / a_max), w weight decay

A parameter group is a group of the paper: one norm, one a_max. Differences from the paper: the scale s, 1 in the paper,
makes the root mean square of the update's entries 0.2 eta, as AdamW's is about (Liu et al., 2025, arXiv 2502.16982,
section 2.2), so that one rate serves all norms and is of AdamW's size; weight decay is decoupled and goes with the
layer's own rate; U V^T by better coefficients; G~ may be measured as in noise.py, and every fourth step, with b2^4,
because a nuclear norm costs more than a direction; H of a layer whose gradients are missing stays.

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

from distrobust.errors import CheckpointError, ConfigError
from distrobust.optim import norms
from distrobust.optim.groups import dense_gradients, describe, log, norms_of, refuse_unservable, trained_parameters
from distrobust.optim.noise import IndependentNoise, Noise, SpreadNoise, TemporalNoise
from distrobust.optim.rates import check_alpha, rate_ratios

NOISES = ("previous", "independent", "none")
ADAMW_RMS = 0.2


class Lanton(Optimizer):
    """params: a model, whose parameters are put into groups by `norms_of` (logged once; `overrides` as there), or torch
    parameter groups, each with a "norm".

    lr: how far the quietest layer of a group moves: by 0.2 lr in the root mean square of its entries, or, with
    adjust_lr_fn None, by lr in its norm, as in the paper, where every group has a rate of its own ("lr" in the groups).
    momentum b1, beta2 b2, alpha: see the module. noise: "previous" (the paper's option 1), "independent" (option 2; see
    `keep_independent`) or "none" (ratios of 1). noise_every: steps from one measurement of "previous" to the next; 1 is
    the paper's.
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
        adjust_lr_fn: str | None = "match_rms_adamw",
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "alpha": alpha, "weight_decay": weight_decay}
        defaults |= {"norm": None, "adjust_lr_fn": adjust_lr_fn}
        _check(defaults, "Lanton")
        if noise not in NOISES:
            raise ConfigError(f"Lanton noise: got {noise!r}, wanted one of {', '.join(NOISES)}")
        super().__init__(groups_of(params, overrides) if isinstance(params, nn.Module) else params, defaults)
        self._names: list[list[str]] = []  # beside the groups, not in them: a checkpoint may use others
        named: dict[str, Tensor] = {}
        by_name: dict[str, norms.Norm] = {}
        for number, group in enumerate(self.param_groups):
            _check(group, f"Lanton, group {number},")
            names = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
            self._names.append(list(names))
            for name, parameter in zip(names, group["params"], strict=True):
                refuse_unservable(name, parameter)
                norm = group["norm"]
                if norm not in norms.NORMS:
                    raise ConfigError(
                        f"Lanton, group {number}: got norm {norm!r}, wanted one of {', '.join(norms.NORMS)}; or pass "
                        "the model instead of its parameters"
                    )
                if name in named:
                    raise ConfigError(
                        f"Lanton, group {number}: got the name {name!r} a second time; pass parameters without names, "
                        "or the names they have in one model"
                    )
                named[name], by_name[name] = parameter, norm
        self.noise: Noise | None = None
        if noise == "previous":
            self.noise = TemporalNoise(named, by_name, beta2, noise_every)
        elif noise == "independent":
            self.noise = IndependentNoise(named, by_name, beta2)
        self._is_observed = False  # an exchange measures the noise, before it compresses

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_names"):
            raise ConfigError("Lanton: its noise is of the parameters it was made with; make it anew to add others")
        super().add_param_group(param_group)

    def observer_for(self, num_ranks: int, always_dense: bool, parameters: Mapping[str, Tensor]) -> Noise | None:
        """What an exchange shall call on every gradient of `parameters`, in every step; `step` measures no more.

        Workers' spread where their mean is known in every step; otherwise each one's own successive gradients. The
        optimizer takes on the exchange's names and keeps what it measured so far.
        """
        if isinstance(self.noise, IndependentNoise):
            raise ConfigError(
                "Lanton noise='independent': in an exchange nobody knows the mean of the second gradient; wanted "
                "'previous', which measures workers' own gradients there"
            )
        if self.noise is None:
            return None
        norm_of = {p: group["norm"] for group in self.param_groups for p in group["params"]}
        chosen: dict[str, norms.Norm] = {name: norm_of.get(p, "frobenius") for name, p in parameters.items()}
        kind = SpreadNoise if num_ranks > 1 and always_dense else TemporalNoise
        noise = kind(parameters, chosen, self.noise.beta2, every=self.noise.every)
        noise.continue_from(self.noise)
        known = {p: name for name, p in parameters.items()}
        for names, group in zip(self._names, self.param_groups, strict=True):
            names[:] = [known.get(p, name) for name, p in zip(names, group["params"], strict=True)]
        log(f"Lanton: noise from {_SOURCES[kind, num_ranks > 1]}")
        self.noise, self._is_observed = noise, True
        return noise

    @property
    def ratios(self) -> dict[str, Tensor]:
        """name -> sqrt(a / a_max), float32 scalars, with the noise as it is known now."""
        pairs = zip(self._names, self.param_groups, strict=True)
        return {name: ratio for names, group in pairs for name, ratio in self._ratios(names, group).items()}

    def load_noise(self, state: Mapping[str, Any]) -> None:
        """The noise of a `state_dict()` alone."""
        if self.noise is not None:
            self.noise.load_state_dict(state)

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
        for names, group in zip(self._names, self.param_groups, strict=True):
            self._step_group(names, group, gradients)
        return loss

    def _step_group(self, group_names: list[str], group: dict[str, Any], gradients: Mapping[str, Tensor]) -> None:
        pairs = [(n, p) for n, p in zip(group_names, group["params"], strict=True) if n in gradients]
        if not pairs:
            return
        names, parameters = [n for n, _ in pairs], [p for _, p in pairs]
        buffers = [self._buffer(p) for p in parameters]
        grads = [gradients[name].to(torch.float32) for name in names]
        torch._foreach_lerp_(buffers, grads, 1.0 - group["momentum"])
        steps = norms.directions(group["norm"], buffers)
        ratios = self._ratios(group_names, group)
        rates = [group["lr"] * ratios[name] for name in names]
        if group["weight_decay"]:
            kept = [1.0 - rate * group["weight_decay"] for rate in rates]
            torch._foreach_mul_(parameters, [k.to(p.dtype) for k, p in zip(kept, parameters, strict=True)])
        torch._foreach_mul_(steps, [rate * _scale(group, p) for rate, p in zip(rates, parameters, strict=True)])
        torch._foreach_sub_(parameters, steps)

    def _ratios(self, names: list[str], group: dict[str, Any]) -> dict[str, Tensor]:
        """sqrt(a / a_max) of the group's layers, float32 scalars on the parameters' device."""
        if self.noise is None:
            return {name: torch.ones((), device=group["params"][0].device) for name in names}
        h = self.noise.of(names)
        ratios = rate_ratios(h, torch.zeros_like(h, dtype=torch.int64), group["alpha"])
        return dict(zip(names, ratios.to(torch.float32).unbind(), strict=True))

    def _gradients(self) -> dict[str, Tensor]:
        groups = zip(self._names, self.param_groups, strict=True)
        named = {n: p for names, group in groups for n, p in zip(names, group["params"], strict=True)}
        return dense_gradients(named, "Lanton")

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
        if "noise" not in state_dict:
            raise CheckpointError("this is not the state of a Lanton optimizer: it holds no 'noise'")
        noise = state_dict["noise"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "noise"})
        for i, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            if i in state_dict["state"]:  # torch casts to the parameter's dtype
                buffer = state_dict["state"][i]["momentum_buffer"]
                self.state[parameter]["momentum_buffer"] = buffer.to(parameter.device, torch.float32, copy=True)
        if noise is not None:
            self.load_noise(noise)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


_SOURCES = {
    (SpreadNoise, True): "the spread of workers' gradients",
    (TemporalNoise, True): "each worker's successive gradients, since under compression nobody knows their mean",
    (TemporalNoise, False): "successive gradients, since there is one worker",
}


def _scale(group: Mapping[str, Any], parameter: Tensor) -> float:
    """s of the module; 1 for states of before there was one."""
    return ADAMW_RMS / norms.entry_rms(group["norm"], parameter) if group.get("adjust_lr_fn") else 1.0


def groups_of(model: nn.Module, overrides: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """A torch parameter group for each norm, its parameters with their names."""
    parameters = trained_parameters(model)
    chosen = norms_of(model, overrides)
    log(f"Lanton: {describe(chosen, parameters)}")
    return [
        {"params": [(name, parameters[name]) for name in chosen if chosen[name] == norm], "norm": norm}
        for norm in norms.NORMS
        if norm in chosen.values()
    ]


def _check(options: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for an impossible value among the options of a group."""
    for name, below in (("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)):
        if not 0.0 <= options[name] < below:
            raise ConfigError(f"{where} {name}: got {options[name]}, wanted a number from 0 to below {below:g}")
    check_alpha(options["alpha"], f"{where} alpha")
    if options["adjust_lr_fn"] not in (None, "match_rms_adamw"):
        raise ConfigError(f"{where} adjust_lr_fn: got {options['adjust_lr_fn']!r}, wanted 'match_rms_adamw' or None")
