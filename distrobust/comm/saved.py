"""Residuals in a checkpoint: saved in the parameters' shapes, taken back only by the run they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distrobust.comm.flat import flat_like, unflat
from distrobust.compression.memory import Residual, Rule
from distrobust.errors import CheckpointError


def save(residuals: Mapping[str, Residual], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copies in the parameters' shapes, whatever their memory format and DDP's buckets, and what they took over.

    Residuals of parameters that are not in `parameters`, pieces of them, stay flat.
    """
    entries = {}
    for name, residual in residuals.items():
        entry: dict[str, Any] = {"v": _shaped(residual.v, parameters.get(name)), "settled": residual.settled}
        if residual.rule.momentum:
            entry["u"] = _shaped(residual.u, parameters.get(name))
        entries[name] = entry
    return {"residuals": entries, "rules": {name: _taken_over(residual.rule) for name, residual in residuals.items()}}


def load(state: Mapping[str, Any], residuals: Mapping[str, Residual], parameters: Mapping[str, Tensor]) -> None:
    """Takes back what `save` put into `state`; CheckpointError, changing nothing, if it is of another run."""
    entries, rules = state["residuals"], state.get("rules", {})  # older states hold no rules
    differing = sorted(set(entries) ^ set(residuals))
    if differing:
        raise CheckpointError(f"residuals of another model: {len(differing)} parameters differ, first {differing[0]!r}")
    for name, residual in residuals.items():
        _refuse_another(name, entries[name], rules.get(name), residual, parameters.get(name))
    for name, residual in residuals.items():
        entry, parameter = entries[name], parameters.get(name)
        u = _flat(entry["u"], parameter) if "u" in entry else torch.zeros(0)
        residual.load(u, _flat(entry["v"], parameter), entry["settled"])


def _refuse_another(
    name: str, entry: Mapping[str, Any], rule: tuple[Any, ...] | None, residual: Residual, parameter: Tensor | None
) -> None:
    here = _taken_over(residual.rule)
    if rule is not None and tuple(rule) != here:
        text = "momentum {}, nesterov {}, weight decay {}"
        raise CheckpointError(
            f"residual of {name!r}: saved with {text.format(*rule)}, this run has {text.format(*here)}: call "
            "compress() on a fresh optimizer, then load the states of both"
        )
    wanted = tuple(residual.v.shape if parameter is None else parameter.shape)
    if tuple(entry["v"].shape) != wanted:
        raise CheckpointError(f"residual of {name!r}: got shape {tuple(entry['v'].shape)}, wanted {wanted}")
    if ("u" in entry) != bool(residual.rule.momentum):
        saved, this = ("with", "without") if "u" in entry else ("without", "with")
        raise CheckpointError(f"residual of {name!r}: saved {saved} momentum, this run is {this} it")


def _taken_over(rule: Rule) -> tuple[float, bool, float]:
    """What the parameter's optimizer lost to its residual: momentum, nesterov, weight_decay."""
    return (rule.momentum, rule.nesterov, rule.weight_decay)


def _shaped(values: Tensor, parameter: Tensor | None) -> Tensor:
    return values.clone() if parameter is None else unflat(values, parameter)


def _flat(values: Tensor, parameter: Tensor | None) -> Tensor:
    return values if parameter is None else flat_like(values, parameter)
