"""Moves momentum and coupled weight decay out of an optimizer, so that each is applied once.

Momentum left in the optimizer would act on top of the residual's (Paddle shipped that), and weight decay left there
would act on coordinates that were not sent (it cost 2 % ImageNet accuracy elsewhere). What cannot be moved is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from distrobust.comm.bucket import Observer
from distrobust.compression.memory import Rule
from distrobust.errors import ConfigError

_log = logging.getLogger(__name__)

_WRAPPERS = {"accelerate", "lightning", "pytorch_lightning"}  # whose optimizers hand everything on to their .optimizer


class NoiseAdaptive(Protocol):
    """An optimizer whose rates follow each layer's gradient noise, which an exchange measures before it compresses."""

    ratios: Mapping[str, Any]  # of the last step, by parameter
    noise: Any  # None: it measures none

    def observer_for(self, num_ranks: int, always_dense: bool, parameters: Mapping[str, Parameter]) -> Observer | None:
        """What is to be called on every gradient of `parameters`, whose names here the optimizer takes on.

        It measures nothing by itself any more.
        """
        ...


@dataclass(frozen=True)
class Takeover:
    """A rule for every parameter, and the momentum buffers the optimizer had gathered (shape of the parameter)."""

    rules: dict[str, Rule]
    momentum_buffers: dict[str, Tensor]


def unwrapped(optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """The optimizers that make the step: one or several, without the wrapper of Accelerate or Lightning."""
    inner: list[Any] = [each for one in _seen_through(optimizer) for each in getattr(one, "optimizers", [one])]
    for one in inner:
        if not isinstance(one, torch.optim.Optimizer):
            raise ConfigError(f"compress: got a {type(one).__name__} as optimizer, wanted a torch.optim.Optimizer")
    owned = [parameter for one in inner for group in one.param_groups for parameter in group["params"]]
    if len(set(owned)) < len(owned):
        raise ConfigError("compress: a parameter is in two optimizers and would be stepped twice; give it one")
    return inner


def noise_adaptive(optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> NoiseAdaptive | None:
    """The one among them whose rates follow the gradient noise; None if there is none."""
    found = [one for one in _seen_through(optimizer) if hasattr(one, "observer_for")]
    if len(found) > 1:
        raise ConfigError(
            "compress: got two optimizers that measure gradient noise, wanted one; hand all optimizers to one "
            "NoiseAdaptive([...], model)"
        )
    return found[0] if found else None


def scaler_of(optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> Any:
    """The GradScaler that Accelerate put into its wrapper; None if there is none."""
    given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    scalers = [getattr(one, "scaler", None) for one in given if _is_wrapper(one)]
    return next((scaler for scaler in scalers if scaler is not None), None)


def _seen_through(optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> list[Any]:
    given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    return [getattr(one, "optimizer", one) if _is_wrapper(one) else one for one in given]


def _is_wrapper(optimizer: object) -> bool:
    return type(optimizer).__module__.partition(".")[0] in _WRAPPERS


def before_update(optimizer: torch.optim.Optimizer, act: Callable[[], None]) -> None:
    """Calls `act` in every optimizer.step, once gradients are there: after the closure if one is given.

    Lightning runs backward in a closure. Before it, `act` would judge this step by the one before.
    """

    def hook(_: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            act()
            return None

        def closure_then_act() -> Any:
            loss = closure()
            act()
            return loss

        others = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], closure_then_act, *args[2:]), others

    optimizer.register_step_pre_hook(hook)


def complete_(
    optimizers: Sequence[torch.optim.Optimizer], taken: Takeover, moved: bool, acts: Sequence[Callable[[], None]]
) -> None:
    """Empties `optimizers`, which are changed, if momentum was `moved`; calls `acts` before each of their updates."""
    if moved:
        empty_(optimizers, taken)
    for one in optimizers:
        if moved:
            one.register_step_pre_hook(lambda emptied, *_: refuse_return(emptied))
        for act in acts:
            before_update(one, act)


def take_over(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: dict[str, Parameter],
    *,
    masking: bool,
    clip: float | None,
) -> Takeover:
    """Reads momentum, Nesterov and weight decay from torch.optim.SGD, for `empty_` to remove them there.

    Raises ConfigError for an optimizer that cannot be emptied.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    rules: dict[str, Rule] = {}
    buffers: dict[str, Tensor] = {}
    for optimizer in optimizers:
        if type(optimizer) is not torch.optim.SGD:
            raise ConfigError(_refusal(optimizer))
        for group in optimizer.param_groups:
            _check_group(group, names)
            moved = Rule(group["momentum"], group["nesterov"], group["weight_decay"], masking, clip)
            for parameter in group["params"]:
                if parameter not in names:
                    continue
                rules[names[parameter]] = moved
                buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
                if buffer is not None and moved.momentum:
                    buffers[names[parameter]] = buffer
    _refuse_strangers(rules, parameters)
    return Takeover(rules, buffers)


def empty_(optimizers: Sequence[torch.optim.Optimizer], taken: Takeover) -> None:
    """Removes from `optimizers`, which are changed, what `take_over` read; their learning rates stay."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update(momentum=0.0, nesterov=False, weight_decay=0.0)
            for parameter in group["params"]:
                optimizer.state.get(parameter, {}).pop("momentum_buffer", None)
    used = sorted({(rule.momentum, rule.nesterov, rule.weight_decay) for rule in taken.rules.values()})
    _log.info("momentum, Nesterov and weight decay moved from the optimizer into the residual: %s", used)


def refuse_return(optimizer: torch.optim.Optimizer) -> None:
    """Raises ConfigError if momentum or weight decay is back in an optimizer that `empty_` had emptied."""
    for group in optimizer.param_groups:
        if group["momentum"] or group["weight_decay"]:
            raise ConfigError(
                f"optimizer SGD: momentum {group['momentum']} and weight decay {group['weight_decay']} came back after "
                "compress() had moved them, and would act twice: pass cycle_momentum=False to the learning-rate "
                "schedule; load an optimizer state saved without compression before calling compress()"
            )


def leave_in_place(
    optimizers: Sequence[torch.optim.Optimizer], parameters: dict[str, Parameter], *, clip: float | None
) -> Takeover:
    """Plain error feedback under optimizers that keep their own moments and weight decay."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "optimizer LBFGS: it evaluates the loss several times a step, and each would be exchanged and change "
                "the residual; use an optimizer with one gradient a step"
            )
    owned = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    rules = {
        name: Rule(momentum=0.0, masking=False, clip=clip)
        for name, parameter in parameters.items()
        if parameter in owned
    }
    _refuse_strangers(rules, parameters)
    return Takeover(rules, {})


def _refusal(optimizer: torch.optim.Optimizer) -> str:
    kind = type(optimizer).__name__
    return (
        f"optimizer {kind}: its first moment cannot be moved into the residual (wanted torch.optim.SGD); pass "
        "momentum='optimizer' to compress() to run plain error feedback under it"
    )


def _check_group(group: dict[str, Any], names: dict[Parameter, str]) -> None:
    if group["dampening"]:
        raise ConfigError(
            f"optimizer SGD: dampening {group['dampening']} cannot be moved into the residual; set it to 0"
        )
    if group["maximize"]:
        raise ConfigError("optimizer SGD: maximize=True cannot be moved into the residual; negate the loss instead")
    if isinstance(group["momentum"], Tensor) or isinstance(group["weight_decay"], Tensor):
        raise ConfigError("optimizer SGD: momentum and weight decay must be numbers, not tensors, to be moved")
    others = sum(parameter.requires_grad and parameter not in names for parameter in group["params"])
    if others and (group["momentum"] or group["weight_decay"]):
        raise ConfigError(
            f"optimizer SGD: {others} of its parameters are not exchanged by this model and would lose their momentum "
            "and weight decay; give them an optimizer of their own"
        )


def _refuse_strangers(rules: dict[str, Rule], parameters: dict[str, Parameter]) -> None:
    missing = [name for name in parameters if name not in rules]
    if missing:
        raise ConfigError(
            f"{len(missing)} parameters of the model are not in the optimizer, first {missing[0]!r}: freeze them "
            "(requires_grad=False, before wrapping the model) or hand them to the optimizer"
        )
