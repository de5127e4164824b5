"""Copying weights into a model by name, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from distrobust.errors import ModelError

_NUM_SHOWN = 3  # names listed per kind in an error


def load_weights(model: nn.Module, state_dict: Mapping[str, object], source: str) -> None:
    """Copy `state_dict` (parameters and buffers by name) into `model`, all or nothing.

    source: where the weights come from, named in the error. Tensors of another dtype are converted; the
    model's device and memory format are kept. Raises ModelError, in one line, naming the first few and
    the number of names that are missing, unexpected or of another shape; the model is then unchanged.
    """
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in state_dict]
    unexpected = [name for name in state_dict if name not in wanted]
    differing = [
        f"{name} is {_shape(state_dict[name])}, the model's is {_shape(tensor)}"
        for name, tensor in wanted.items()
        if name in state_dict and _shape(state_dict[name]) != _shape(tensor)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
    problems = [f"{len(names)} {kind} ({first_of(names)})" for kind, names in kinds if names]
    if not problems:
        model.load_state_dict(dict(state_dict))
        return
    hint = "was it made by another model, class count or image size?"
    for prefix in ("module.", "_orig_mod."):
        if unexpected and all(name.startswith(prefix) for name in unexpected):
            hint = f"the names start with {prefix!r}: save the state of the inner module, not of its wrapper"
    raise ModelError(f"{source}: weights do not fit the model: {', '.join(problems)}; {hint}")


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"no tensor but {type(value).__name__}"


def first_of(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")
