"""Which norm a parameter is measured and moved in, for any torch model: the groups of LANTON, table 1 of the paper.

    one dimension, or all but one of size 1   rms       biases, norms, class tokens
    weight of nn.Embedding(Bag)               sign
    weight of the last nn.Linear              sign      the output head
    all others                                spectral  linear layers, attention, convolutions as out x (in k k)

Hidden matrices of a model without any nn.Linear stay spectral: there is no head to find. Where this guesses wrong, say
so: `norms_of(model, {"head.weight": "spectral", "encoder.*": "rms"})`.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distrobust.errors import ConfigError
from distrobust.optim.norms import NORMS, Norm

_log = logging.getLogger(__name__)


@functools.cache
def log(text: str) -> None:
    """Once for each text."""
    _log.info(text)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter of those with requires_grad, in the model's order; of what is inside if it is wrapped for DDP.

    Raises ConfigError if there is none, and for one without a direction.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConfigError("the model has no parameter that is trained; wanted at least one with requires_grad")
    for name, parameter in parameters.items():
        refuse_unservable(name, parameter)
    return parameters


def norms_of(model: nn.Module, overrides: Mapping[str, str] | None = None) -> dict[str, Norm]:
    """name -> norm of every parameter that is trained, in the model's order; `overrides`: pattern -> norm.

    Raises ConfigError for a pattern that matches nothing, an unknown norm, and a parameter no norm can serve.
    """
    parameters = trained_parameters(model)
    signs = _signs(parameters, model)
    norms: dict[str, Norm] = {}
    for name, parameter in parameters.items():
        is_vector = parameter.numel() == max(parameter.shape)
        norms[name] = "rms" if is_vector else "sign" if name in signs else "spectral"
    for pattern, norm in (overrides or {}).items():
        if norm not in NORMS:
            raise ConfigError(f"norm of {pattern!r}: got {norm!r}, wanted one of {', '.join(NORMS)}")
        found = fnmatch.filter(norms, pattern)
        if not found:
            closest = difflib.get_close_matches(pattern, norms, n=1, cutoff=0.0)
            raise ConfigError(f"norms: {pattern!r} matches no parameter that is trained; closest: {closest[0]!r}")
        norms.update(dict.fromkeys(found, norm))
    return norms


def describe(norms: Mapping[str, str], parameters: Mapping[str, Tensor]) -> str:
    """One line a norm: how many parameters, how many numbers, the first and the last name."""
    sizes = {name: p.numel() for name, p in parameters.items()}
    lines = []
    for norm in sorted(set(norms.values())):
        names = [name for name in norms if norms[name] == norm]
        named = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        lines.append(f"{norm}: {len(names)} parameters, {sum(sizes[n] for n in names):,} numbers ({named})")
    return "; ".join(lines)


def refuse_unservable(name: str, parameter: nn.Parameter) -> None:
    """Raises ConfigError for what has no direction: numbers without a dimension, empty and complex tensors."""
    where = f"parameter {name!r} of shape {tuple(parameter.shape)}"
    if parameter.is_complex():
        raise ConfigError(f"{where} is complex, wanted real numbers; keep it as torch.view_as_real of itself")
    if not parameter.is_floating_point():
        raise ConfigError(f"{where} is {parameter.dtype}, wanted floating point")
    if parameter.ndim == 0:
        raise ConfigError(f"{where} has no dimension, so no norm and no direction; give it the shape (1,)")
    if parameter.numel() == 0:
        raise ConfigError(f"{where} is empty; leave it out of the optimizer")


def dense_gradients(parameters: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    """name -> gradient of those that have one; raises ConfigError for a sparse one."""
    found = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            continue
        if parameter.grad.layout is not torch.strided:
            raise ConfigError(
                f"{who}: the gradient of {name!r} is {parameter.grad.layout}, wanted a dense one; make the embedding "
                "with sparse=False"
            )
        found[name] = parameter.grad
    return found


def _signs(parameters: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """Weights of embeddings and of the last linear layer, under the name that a tied one has in `parameters`."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    chosen = {id(weight) for weight in [*embeddings, *linear[-1:]]}
    return {name for name, parameter in parameters.items() if id(parameter) in chosen}
