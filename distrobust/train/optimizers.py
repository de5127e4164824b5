"""The optimizer of a phase, with rates for each layer where the run asks for them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from distrobust.config import NoiseConfig, PhaseConfig
from distrobust.optim.adaptive import NoiseAdaptive
from distrobust.optim.lanton import Lanton, groups_of
from distrobust.train import transfer

BETA2 = 0.999  # of AdamW, torch's default


def make(
    net: nn.Module, phase: PhaseConfig, noise: NoiseConfig | None, multipliers: Mapping[str, float]
) -> tuple[Optimizer, NoiseAdaptive | Lanton | None]:
    """The optimizer of what trains in `net`, and what makes its rates follow the noise: a wrapper, itself, or nothing.

    multipliers: of the rate, by parameter; 1 for those that are not in it.
    """
    rate, momentum, weight_decay = phase.schedule.peak, phase.momentum, phase.weight_decay
    if phase.optimizer == "lanton":
        groups = transfer.parameter_groups(groups_of(net), multipliers, rate)
        measured = {"noise": "none"} if noise is None else noise.model_dump()
        lanton = Lanton(groups, rate, momentum=momentum, weight_decay=weight_decay, **measured)
        return lanton, None if noise is None else lanton
    trained = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    groups = transfer.parameter_groups([{"params": trained}], multipliers, rate)
    optimizer: Optimizer
    if phase.optimizer == "adamw":
        optimizer = AdamW(groups, rate, betas=(momentum, BETA2), weight_decay=weight_decay)
    else:
        optimizer = SGD(groups, rate, momentum=momentum, nesterov=phase.nesterov, weight_decay=weight_decay)
    return optimizer, None if noise is None else NoiseAdaptive(optimizer, net, **noise.model_dump())
