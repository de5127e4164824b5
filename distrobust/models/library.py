"""Models of other libraries, by configuration: from a directory once, from their description ever after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distrobust.errors import ModelError
from distrobust.models.adapted import freeze_unused_
from distrobust.models.weights import first_of

HUGGINGFACE = "huggingface"
TIMM = "timm:"

ImageShape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class FromDirectory:
    """A model in training mode, float32, on the CPU.

    architecture: plain numbers, strings, lists and dictionaries, from which `rebuild` makes it again. notices: one
    line for everything that is not as in the directory.
    """

    model: nn.Module
    architecture: dict[str, Any]
    notices: tuple[str, ...]


def from_directory(
    name: str,
    directory: Path | None,
    num_classes: int,
    image_shape: ImageShape,
    *,
    image_size: int | None = None,
    seed: int | None = None,
) -> FromDirectory:
    """`huggingface`, or `timm:NAME` (whose weights are random without a directory).

    directory: with config.json and model.safetensors. image_size: see ModelConfig. seed: of a head, or whatever else,
    that is new. Raises ModelError.
    """
    if name == HUGGINGFACE:
        from distrobust.models import huggingface

        if directory is None:
            raise ModelError(f"model {name}: got no directory; set model.directory to one that save_pretrained wrote")
        made = huggingface.load(directory, num_classes, image_shape, image_size, seed)
    else:
        from distrobust.models import timm

        made = timm.load(name.removeprefix(TIMM), directory, num_classes, image_shape, image_size, seed)
    try:
        unused = freeze_unused_(made.model, image_shape)
    except Exception as error:  # whatever the library raises
        _, height, width = image_shape
        seen = f"{height} x {width}" if image_size is None else f"{image_size} x {image_size}"
        reason = " ".join(str(error).split())[:120]
        raise ModelError(
            f"model {name}: cannot take images of {seen} pixels ({reason}); set model.image_size to what it takes"
        ) from error
    notices = [f"{len(unused)} parameters are never used and stay as they are ({first_of(unused)})"] if unused else []
    return FromDirectory(made.model, made.architecture, (*made.notices, *notices))


def rebuild(architecture: Mapping[str, Any], image_shape: ImageShape, *, seed: int | None = None) -> nn.Module:
    """The model of a description, its weights random. Raises ModelError for a description that is none."""
    libraries = ("huggingface", "timm")
    library = architecture.get("library")
    if library not in libraries:
        raise ModelError(f"model: its description names the library {library!r}, wanted one of {', '.join(libraries)}")
    if library == "huggingface":
        from distrobust.models import huggingface

        model = huggingface.rebuild(architecture, seed)
    else:
        from distrobust.models import timm

        model = timm.rebuild(architecture, seed)
    freeze_unused_(model, image_shape)
    return model
