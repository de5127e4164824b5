"""timm's image classifiers by name: the only file that imports timm, which need not be installed.

Weights come from a directory (model.safetensors, as the hub serves timm's models) or are random; nothing is downloaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distrobust.errors import ConfigError, ModelError
from distrobust.models.adapted import Adapted
from distrobust.models.library import FromDirectory, ImageShape
from distrobust.models.preprocessing import fitted
from distrobust.models.reference import seeded
from distrobust.models.weights import first_of, load_weights


def load(
    name: str,
    directory: Path | None,
    num_classes: int,
    image_shape: ImageShape,
    image_size: int | None,
    seed: int | None,
) -> FromDirectory:
    """The classifier `name` with the weights in `directory`, random ones without it; a head of other classes is new."""
    network = _create(name, num_classes, seed)
    settings: Mapping[str, Any] = network.pretrained_cfg
    mean, std = list(settings["mean"]), list(settings["std"])
    wanted = tuple(settings["input_size"][1:]) if settings.get("fixed_input_size") else None
    size, notices = fitted(image_shape, len(mean), wanted, image_size, f"timm:{name}")
    architecture = {
        "library": "timm",
        "name": name,
        "num_classes": num_classes,
        "mean": mean,
        "std": std,
        "size": None if size is None else list(size),
    }
    if directory is not None:
        notices = (*_load_(network, directory), *notices)
    return FromDirectory(Adapted(network, mean, std, size).train(), architecture, notices)


def rebuild(architecture: Mapping[str, Any], seed: int | None) -> nn.Module:
    """The model of a description that `load` made, with random weights."""
    network = _create(architecture["name"], architecture["num_classes"], seed)
    size = architecture["size"]
    return Adapted(network, architecture["mean"], architecture["std"], None if size is None else tuple(size)).train()


def _create(name: str, num_classes: int, seed: int | None) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"model timm:{name}: timm is not installed; pip install timm") from error
    known = timm.list_models()
    if name not in known:
        closest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(closest)}?" if closest else "see timm.list_models()"
        raise ModelError(f"model timm:{name}: timm has no model of that name; {hint}")
    with seeded(seed):
        return timm.create_model(name, pretrained=False, num_classes=num_classes)


def _load_(network: Any, directory: Path) -> tuple[str, ...]:
    """Copies model.safetensors into `network`, but for a head of another number of classes, which is said."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ConfigError("model.directory: safetensors is not installed; pip install 'distrobust[models]'") from error
    path = directory / "model.safetensors"
    try:
        state: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"model.directory {directory}: has no model.safetensors; nothing is downloaded") from None
    except Exception as error:
        raise ModelError(f"{path}: not a safetensors file ({' '.join(str(error).split())[:120]})") from error
    own = network.state_dict()
    classifier = network.pretrained_cfg.get("classifier", ())
    prefixes = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    head = [name for name in own if name.startswith(tuple(f"{prefix}." for prefix in prefixes))]
    new = [name for name in head if name not in state or state[name].shape != own[name].shape]
    load_weights(network, {**state, **{name: own[name] for name in new}}, str(path))
    return (f"the head is new ({first_of(new)}): another number of classes there",) if new else ()
