"""Moves momentum and coupled weight decay out of an optimizer, so that each is applied once.

Momentum left in the optimizer would act on top of the residual's (Paddle shipped that), and weight decay left there
would act on coordinates that were not sent (it cost 2 % ImageNet accuracy elsewhere). What cannot be moved is refused.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

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
    """Takes momentum, Nesterov and weight decay out of a torch.optim.SGD; its learning rates stay.

    Raises ConfigError, changing nothing, for an optimizer it does not know how to empty.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ConfigError(_refusal(optimizer))
    names = {parameter: name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        _check_group(group)
    rules: dict[str, Rule] = {}
    buffers: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        moved = Rule(group["momentum"], group["nesterov"], group["weight_decay"], masking, clip)
        for parameter in group["params"]:
            if parameter not in names:
                continue
            rules[names[parameter]] = moved
            buffer = optimizer.state[parameter].pop("momentum_buffer", None)
            if buffer is not None and moved.momentum:
                buffers[names[parameter]] = buffer
        group.update(momentum=0.0, nesterov=False, weight_decay=0.0)
    _refuse_strangers(rules, parameters)
    used = sorted({(rule.momentum, rule.nesterov, rule.weight_decay) for rule in rules.values()})
    _log.info("momentum, Nesterov and weight decay moved from the optimizer into the residual: %s", used)
    return Takeover(rules, buffers)


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


def _check_group(group: dict[str, object]) -> None:
    if group["dampening"]:
        raise ConfigError(
            f"optimizer SGD: dampening {group['dampening']} cannot be moved into the residual; set it to 0"
        )
    if group["maximize"]:
        raise ConfigError("optimizer SGD: maximize=True cannot be moved into the residual; negate the loss instead")
    if isinstance(group["momentum"], Tensor) or isinstance(group["weight_decay"], Tensor):
        raise ConfigError("optimizer SGD: momentum and weight decay must be numbers, not tensors, to be moved")


def _refuse_strangers(rules: dict[str, Rule], parameters: dict[str, Parameter]) -> None:
    missing = [name for name in parameters if name not in rules]
    if missing:
        raise ConfigError(
            f"{len(missing)} parameters of the model are not in the optimizer, first {missing[0]!r}: freeze them "
            "(requires_grad=False, before wrapping the model) or hand them to the optimizer"
        )
