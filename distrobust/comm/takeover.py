"""Moves momentum and coupled weight decay out of an optimizer, so that each is applied once.

Momentum left in the optimizer would act on top of the residual's (Paddle shipped that), and weight decay left there
would act on coordinates that were not sent (it cost 2 % ImageNet accuracy elsewhere). What cannot be moved is refused.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from distrobust.compression.memory import Rule
from distrobust.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Takeover:
    """A rule for every parameter, and the momentum buffers the optimizer had gathered (shape of the parameter)."""

    rules: dict[str, Rule]
    momentum_buffers: dict[str, Tensor]


def take_over(
    optimizer: torch.optim.Optimizer, parameters: dict[str, Parameter], *, masking: bool, clip: float | None
) -> Takeover:
    """Reads momentum, Nesterov and weight decay from a torch.optim.SGD, for `empty_` to remove them there.

    Raises ConfigError for an optimizer that cannot be emptied.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ConfigError(_refusal(optimizer))
    names = {parameter: name for name, parameter in parameters.items()}
    rules: dict[str, Rule] = {}
    buffers: dict[str, Tensor] = {}
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


def empty_(optimizer: torch.optim.Optimizer, taken: Takeover) -> None:
    """Removes from `optimizer`, which is changed, what `take_over` read; its learning rates stay."""
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
    optimizer: torch.optim.Optimizer, parameters: dict[str, Parameter], *, clip: float | None
) -> Takeover:
    """Plain error feedback under an optimizer that keeps its own moments and weight decay."""
    owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
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
