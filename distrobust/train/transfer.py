"""Partial transfer: which layers are fine-tuned, and how fast.

P-Transfer (Shen et al., AAAI 2021) freezes some layers of a pre-trained model and gives each of the others a rate of
its own. Here `model.rates` maps patterns over parameter names to multipliers of the phase's rate, 0 for a frozen layer;
which multipliers are good is searched for in transfer_search.py.

A frozen layer is frozen whole: a batch norm all of whose parameters are frozen also keeps its running statistics and
normalises by them while the others train, so that the layer computes in training what it computes in evaluation.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from distrobust.errors import ConfigError


def multipliers(model: nn.Module, rates: Mapping[str, float]) -> dict[str, float]:
    """name -> multiplier of every parameter, by the last of the patterns (as of a shell) that matches it; 1 without.

    Raises ConfigError for a pattern that matches nothing, or if nothing is left to train.
    """
    found = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    for pattern, multiplier in rates.items():
        names = fnmatch.filter(found, pattern)
        if not names:
            closest = difflib.get_close_matches(pattern, found, n=1, cutoff=0.0)
            raise ConfigError(f"model.rates: {pattern!r} matches no parameter of the model; closest: {closest[0]!r}")
        found.update(dict.fromkeys(names, multiplier))
    if not any(found.values()):
        raise ConfigError(
            f"model.rates: {', '.join(map(repr, rates))} freeze all {len(found)} parameters of the model; leave one "
            "above 0"
        )
    return found


def freeze_(model: nn.Module, found: Mapping[str, float]) -> list[nn.Module]:
    """Takes requires_grad from the parameters of `model` whose multiplier is 0; before it is wrapped for DDP.

    Returns the batch norms (whatever has running statistics) that are frozen whole, to be kept in evaluation mode.
    """
    for name, parameter in model.named_parameters():
        if found[name] == 0.0:
            parameter.requires_grad_(False)
    return [
        module
        for prefix, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None
        and (own := [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)])
        and not any(found[name] for name in own)
    ]


def parameter_groups(
    groups: Iterable[Mapping[str, Any]], found: Mapping[str, float], rate: float
) -> list[dict[str, Any]]:
    """Groups of torch.optim with named parameters, cut by multiplier, which each part keeps as `rate_multiplier`."""
    return [
        {
            **group,
            "params": [(name, parameter) for name, parameter in group["params"] if found.get(name, 1.0) == multiplier],
            "lr": rate * multiplier,
            "rate_multiplier": multiplier,
        }
        for group in groups
        for multiplier in dict.fromkeys(found.get(name, 1.0) for name, _ in group["params"])
    ]


def describe(model: nn.Module, found: Mapping[str, float]) -> str:
    """'61 of 130 parameters are frozen (35.1 % of the numbers); rates times 0.1 for 4, 1 for 65'."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    frozen = [name for name, multiplier in found.items() if multiplier == 0.0]
    share = sum(sizes[name] for name in frozen) / sum(sizes.values())
    others = sorted({multiplier for multiplier in found.values() if multiplier})
    counts = ", ".join(f"{m:g} for {sum(value == m for value in found.values())}" for m in others)
    return f"{len(frozen)} of {len(sizes)} parameters are frozen ({share:.1%} of the numbers); rates times {counts}"
