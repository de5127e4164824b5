"""Files with a model's weights and what is needed to build the model again: models/*.pt of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrobust import models
from distrobust.config import ModelConfig
from distrobust.data import Source
from distrobust.errors import ModelError

Architecture = str | Mapping[str, Any]  # the name of a reference network, or a description of another library's


@dataclass(frozen=True)
class Start:
    """The model a run starts from. notices: what is worth saying about it, one line each."""

    net: nn.Module
    architecture: Architecture
    notices: tuple[str, ...] = ()


def starting_model(model: ModelConfig, source: Source, seed: int) -> Start:
    """With the weights of `model.weights`, of `model.directory`, or random ones that follow from `seed`.

    Raises ModelError. Without a directory the description of another library's model is that of the weights file.
    """
    start = Start(build_model(model.name, source, seed), model.name) if not model.is_from_library else None
    if start is None and model.weights is not None and model.directory is None:
        architecture = read_model_file(model.weights)["model"]
        if isinstance(architecture, str):
            raise ModelError(f"{model.weights}: weights of {architecture!r}, got model.name {model.name!r}")
        start = Start(build_model(architecture, source, seed), architecture)
    if start is None:
        made = models.from_directory(
            model.name, model.directory, source.num_classes, source.shape, image_size=model.image_size, seed=seed
        )
        start = Start(made.model, made.architecture, tuple(f"{model.name}: {text}" for text in made.notices))
    if model.weights is not None:
        load_model_file(start.net, model.weights)
    return start


def build_model(architecture: Architecture, source: Source, seed: int) -> nn.Module:
    """A model for the images and classes of `source`, its weights a function of `seed`; ours normalise around 1/2."""
    if not isinstance(architecture, str):
        return models.rebuild(architecture, source.shape, seed=seed)
    channels = source.shape[0]
    return models.build(architecture, source.num_classes, source.shape, [0.5] * channels, [0.25] * channels, seed=seed)


def save_model_file(path: Path, net: nn.Module, architecture: Architecture, source: Source) -> None:
    """Weights with what is needed to build their model again; visible only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    torch.save(
        {
            "model": architecture,
            "classes": list(source.class_names),
            "shape": list(source.shape),
            "state": net.state_dict(),
        },
        temporary,
    )
    temporary.replace(path)


def load_model_file(net: nn.Module, path: Path) -> None:
    """Loads what `save_model_file` wrote; raises ModelError if it is missing, damaged or of another model."""
    models.load_weights(net, read_model_file(path)["state"], str(path))


def read_model_file(path: Path) -> dict[str, Any]:
    """model (see Architecture), classes, shape and state; unpickles tensors and plain values only."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        kinds: dict[str, Any] = {"model": str | dict, "classes": list, "shape": list, "state": dict}
        if not isinstance(content, dict) or not all(isinstance(content.get(k), kinds[k]) for k in kinds):
            raise ValueError("not written by distrobust")
        return content
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; wanted weights written by a run, as models/fine-tuned.pt") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"{path}: not a model file of a run ({reason})") from None
