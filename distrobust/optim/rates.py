"""From the noise of every layer to its learning rate.

LANTON (Hao et al., 2025, arXiv 2510.14009), algorithm 1:

    a = alpha / sqrt(alpha^2 + H);   rate of a layer = eta * sqrt(a / a_max),  a_max over the layer's group

so the quietest layer of a group moves at the full rate. alpha, in units of a gradient's norm, is where a rate begins to
fall: far above the noise all rates are equal, far below it they go with (H_min / H)^(1/4), whatever the scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from distrobust.errors import ConfigError


def rate_ratios(noise: Tensor, groups: Tensor, alpha: float) -> Tensor:
    """sqrt(a / a_max) in (0, 1] for noise H (L,), NaN where none was measured yet: 1 there; groups (L,) int64."""
    a = alpha / torch.sqrt(alpha**2 + noise)
    largest = torch.zeros(int(groups.numel()), dtype=a.dtype, device=a.device)
    largest.scatter_reduce_(0, groups, a.nan_to_num(0.0), "amax")
    return torch.sqrt(a / largest[groups]).nan_to_num(1.0)


def check_alpha(alpha: float, path: str = "noise.alpha") -> None:
    """Raises ConfigError unless alpha is finite and above 0."""
    if not (math.isfinite(alpha) and alpha > 0.0):
        raise ConfigError(f"{path}: got {alpha}, wanted a finite number above 0, in units of a gradient's norm")


def mean_by_layer(ratios: Mapping[str, float]) -> dict[str, float]:
    """Mean ratio by top-level module, the first part of the parameter's name: few enough to plot and to label."""
    return {layer: sum(values) / len(values) for layer, values in _by_layer(ratios).items()}


def norm_by_layer(noise: Mapping[str, float]) -> dict[str, float]:
    """sqrt(sum of H) by top-level module: where H is of Frobenius norms, that of all its parameters as one vector."""
    return {layer: math.sqrt(sum(values)) for layer, values in _by_layer(noise).items()}


def _by_layer(values: Mapping[str, float]) -> dict[str, list[float]]:
    layers: dict[str, list[float]] = {}
    for name, value in values.items():
        layers.setdefault(name.split(".")[0], []).append(value)
    return layers
