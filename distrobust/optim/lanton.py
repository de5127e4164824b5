"""Learning-rate ratios per parameter that follow its gradient noise.

LANTON (Hao et al., 2025, arXiv 2510.14009):

    a_t = alpha / sqrt(alpha^2 + H_t);   rate of a layer = eta_t * sqrt(a_t / a_max),  a_max over the layer's group

so the quietest layer of a group moves at the full rate. Difference from the paper: this is the rate alone, on top of an
optimizer of your choice; the update itself is that optimizer's, not the norm-constrained one. Groups are weights of
convolutions and linear layers ("matrix") and everything with one dimension ("vector": norms, biases).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer


def rate_ratios(noise: Mapping[str, float], groups: Mapping[str, str], alpha: float) -> dict[str, float]:
    """sqrt(a / a_max) in (0, 1] for every name in `groups` (name -> group); 1 where no noise was measured yet."""
    a = {name: alpha / math.sqrt(alpha**2 + noise[name]) for name in groups if name in noise}
    a_max: dict[str, float] = {}
    for name, value in a.items():
        a_max[groups[name]] = max(value, a_max.get(groups[name], 0.0))
    return {name: math.sqrt(a[name] / a_max[groups[name]]) if name in a else 1.0 for name in groups}


def default_groups(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """name -> "matrix" or "vector"."""
    return {name: "matrix" if parameter.ndim >= 2 else "vector" for name, parameter in parameters.items()}


def set_rates(optimizer: Optimizer, base: float, ratios: Mapping[str, float]) -> None:
    """Sets each parameter group's rate to base times its ratio; a group without a "name" gets the base rate."""
    for group in optimizer.param_groups:
        group["lr"] = base * ratios.get(group.get("name", ""), 1.0)


def mean_by_layer(ratios: Mapping[str, float]) -> dict[str, float]:
    """Mean ratio by top-level module, the first part of the parameter's name: few enough to plot and to label."""
    layers: dict[str, list[float]] = {}
    for name, ratio in ratios.items():
        layers.setdefault(name.split(".")[0], []).append(ratio)
    return {layer: sum(values) / len(values) for layer, values in layers.items()}
