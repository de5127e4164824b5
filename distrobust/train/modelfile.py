"""Files with a model's weights and what is needed to build the model again: models/*.pt of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrobust import models
from distrobust.data import Source
from distrobust.errors import ModelError


def build_model(name: str, source: Source, seed: int) -> nn.Module:
    """A model for the images and classes of `source`, its weights a function of `seed`, normalised around 1/2."""
    channels = source.shape[0]
    return models.build(name, source.num_classes, source.shape, [0.5] * channels, [0.25] * channels, seed=seed)


def save_model_file(path: Path, net: nn.Module, name: str, source: Source) -> None:
    """Weights with what is needed to build their model again; visible only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    torch.save(
        {
            "model": name,
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
    """model, classes, shape and state; unpickles tensors and plain values only."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        kinds = {"model": str, "classes": list, "shape": list, "state": dict}
        if not isinstance(content, dict) or not all(isinstance(content.get(k), kinds[k]) for k in kinds):
            raise ValueError("not written by distrobust")
        return content
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; wanted weights written by a run, as models/fine-tuned.pt") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"{path}: not a model file of a run ({reason})") from None
