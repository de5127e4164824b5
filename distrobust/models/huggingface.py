"""Hugging Face image classifiers from a directory: the only file that imports transformers.

The directory is one that `save_pretrained` wrote, or the hub serves: config.json, model.safetensors (or its shards) and
preprocessor_config.json. Nothing is downloaded, nothing is unpickled, and no code that lies there is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrobust.errors import ConfigError, ModelError
from distrobust.models.adapted import Adapted
from distrobust.models.library import FromDirectory, ImageShape
from distrobust.models.preprocessing import fitted, read_json, standardisation, trained_side
from distrobust.models.reference import seeded
from distrobust.models.weights import first_of

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_NOT_KEPT = ("_name_or_path", "auto_map", "transformers_version")  # of a configuration, in a description


def load(
    directory: Path, num_classes: int, image_shape: ImageShape, image_size: int | None, seed: int | None
) -> FromDirectory:
    """The classifier in `directory` with its weights; its head is new where it is of another number of classes."""
    _check_files(directory)
    with _transformers(directory) as library:
        config = library.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        num_before, config.num_labels = config.num_labels, num_classes
        head = _head_names(library, config)
        with seeded(seed):
            network, report = library.AutoModelForImageClassification.from_pretrained(
                directory,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    others = {name: shape for name, *shape in report["mismatched_keys"]}
    new = [name for name in network.state_dict() if name in report["missing_keys"] or name in others]
    if not set(new) <= head:
        _refuse_weights(directory, sorted(report["missing_keys"]), sorted(others), sorted(report["unexpected_keys"]))
    vision = getattr(config, "vision_config", config)  # of models that know text too
    channels = int(getattr(vision, "num_channels", 3))
    mean, std, assumed = standardisation(directory, channels)
    size, resized = fitted(image_shape, channels, _size_of(vision), image_size, str(directory))
    side = trained_side(directory)
    if size is None and side is not None and side not in image_shape[1:]:
        resized += (f"trained on {side} x {side} pixels, gets them as they are; model.image_size={side} resizes them",)
    architecture = {
        "library": "huggingface",
        "config": {k: v for k, v in _plain(config).items() if k not in _NOT_KEPT} | {"dtype": "float32"},
        "mean": list(mean),
        "std": list(std),
        "size": None if size is None else list(size),
    }
    notices = []
    if new:
        reason = f"{num_before} classes there, {num_classes} here" if others else "there is none in the file"
        notices.append(f"the head is new ({first_of(new)}): {reason}")
    if unused := sorted(report["unexpected_keys"]):
        notices.append(f"{len(unused)} weights of the file have no place in the model ({first_of(unused)})")
    model = Adapted(network, mean, std, size).train()
    return FromDirectory(model, architecture, (*notices, *assumed, *resized))


def rebuild(architecture: Mapping[str, Any], seed: int | None) -> nn.Module:
    """The model of a description that `load` made, with random weights."""
    with _transformers("model file") as library, seeded(seed):
        config = library.AutoConfig.for_model(**architecture["config"])
        network = library.AutoModelForImageClassification.from_config(
            config, trust_remote_code=False, dtype=torch.float32
        )
        size = architecture["size"]
        return Adapted(
            network, architecture["mean"], architecture["std"], None if size is None else tuple(size)
        ).train()


@contextmanager
def _transformers(where: object) -> Iterator[Any]:
    """transformers without its tables and progress bars; what goes wrong in it inside becomes one line."""
    try:
        import transformers
        from transformers.utils import logging as its_logging
    except ImportError as error:
        raise ConfigError(
            "model huggingface: transformers is not installed; pip install 'distrobust[models]'"
        ) from error
    logging: Any = its_logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{where}: transformers can make no image classifier of it ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _check_files(directory: Path) -> None:
    if not directory.is_dir():
        raise ModelError(
            f"model.directory {directory}: no such directory; nothing is downloaded, so give one with config.json and "
            "model.safetensors, as save_pretrained writes it"
        )
    if read_json(directory / "config.json") is None:
        raise ModelError(f"model.directory {directory}: has no config.json; wanted what save_pretrained writes")
    if not any((directory / name).exists() for name in _WEIGHTS):
        pickled = (directory / "pytorch_model.bin").exists()
        hint = "; pytorch_model.bin is a pickle, which is not opened: save it again with save_pretrained"
        raise ModelError(f"model.directory {directory}: has no model.safetensors{hint if pickled else ''}")


def _head_names(library: Any, config: Any) -> set[str]:
    """The weights whose shape follows the number of classes, found by asking for one more; no memory is taken."""
    shapes = []
    for more in (0, 1):
        copy = type(config).from_dict(_plain(config))
        copy.num_labels = config.num_labels + more
        with torch.device("meta"):
            network = library.AutoModelForImageClassification.from_config(copy, trust_remote_code=False)
        shapes.append({name: value.shape for name, value in network.state_dict().items()})
    return {name for name, shape in shapes[0].items() if shape != shapes[1][name]}


def _plain(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def _size_of(config: Any) -> tuple[int, int] | None:
    """(height, width) a network was made for; None where any size will do."""
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _refuse_weights(directory: Path, missing: list[str], others: list[str], unexpected: list[str]) -> None:
    kinds = (("missing", missing), ("of another shape", others), ("unexpected", unexpected))
    problems = ", ".join(f"{len(names)} {kind} ({first_of(names)})" for kind, names in kinds if names)
    raise ModelError(
        f"{directory}: its weights are not those of the model in its config.json: {problems}; are both files of the "
        "same model?"
    )
