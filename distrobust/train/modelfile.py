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

# the name of a reference network, the sizes of the transformer, or a description of another library's model
Architecture = str | Mapping[str, Any]


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
    if source.is_text != model.reads_text:
        given = f"texts (column {source.column!r})" if source.is_text else f"images (column {source.column!r})"
        wanted = f"model.name={models.TRANSFORMER}" if source.is_text else "model.name=resnet9"
        raise ModelError(
            f"model {model.name} reads {'texts' if model.reads_text else 'images'}, and the data set holds {given}; "
            f"set {wanted}, or choose another column"
        )
    start = None
    if model.reads_text:
        sizes = {"library": models.TRANSFORMER, **model.transformer.model_dump()}
        start = Start(build_model(sizes, source, seed), sizes)
    elif not model.is_from_library:
        start = Start(build_model(model.name, source, seed), model.name)
    if start is None and model.weights is not None and model.directory is None:
        architecture = read_model_file(model.weights)["model"]
        if isinstance(architecture, str):
            raise ModelError(f"{model.weights}: weights of {architecture!r}, got model.name {model.name!r}")
        start = Start(build_model(architecture, source, seed), architecture)
    if start is None:
        made = models.from_directory(
            model.name,
            model.directory,
            source.num_classes,
            image_shape(source),
            image_size=model.image_size,
            seed=seed,
        )
        start = Start(made.model, made.architecture, tuple(f"{model.name}: {text}" for text in made.notices))
    if model.weights is not None:
        load_model_file(start.net, model.weights)
    return start


def build_model(architecture: Architecture, source: Source, seed: int) -> nn.Module:
    """A model for the rows and classes of `source`, its weights a function of `seed`; ours normalise around 1/2."""
    if reads_text(architecture):
        assert isinstance(architecture, Mapping)
        width, layers, heads = (int(architecture[key]) for key in ("width", "layers", "heads"))
        return models.build_transformer(source.num_classes, source.shape[0], width, layers, heads, seed=seed)
    shape = image_shape(source)
    if not isinstance(architecture, str):
        return models.rebuild(architecture, shape, seed=seed)
    channels = shape[0]
    return models.build(architecture, source.num_classes, shape, [0.5] * channels, [0.25] * channels, seed=seed)


def reads_text(architecture: Architecture) -> bool:
    return not isinstance(architecture, str) and architecture.get("library") == models.TRANSFORMER


def refuse_text(content: dict[str, Any], path: Path) -> None:
    """Raises ModelError for a model of texts, from a command that attacks images. content: of the file `path`."""
    if reads_text(content["model"]):
        raise ModelError(
            f"{path} reads texts, and this command's attacks are for images; its run has evaluated it, clean and "
            "under PGD on the embedding: `distrobust report` its run directory"
        )


def image_shape(source: Source) -> tuple[int, int, int]:
    channels, height, width = source.shape
    return channels, height, width


def save_model_file(path: Path, net: nn.Module, architecture: Architecture, source: Source) -> None:
    """Weights with what is needed to build their model again; visible only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    torch.save(
        {
            "model": architecture,
            "classes": list(source.class_names),
            "shape": list(source.shape),
            "column": source.column,
            "label_column": source.label_column,
            "state": net.state_dict(),
        },
        temporary,
    )
    temporary.replace(path)


def load_model_file(net: nn.Module, path: Path) -> None:
    """Loads what `save_model_file` wrote; raises ModelError if it is missing, damaged or of another model."""
    models.load_weights(net, read_model_file(path)["state"], str(path))


def read_model_file(path: Path) -> dict[str, Any]:
    """model (see Architecture), classes, shape, state, in most column and label_column.

    Unpickles tensors and plain values only.
    """
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
