"""What happens to an image before another library's network sees it, in our convention: images in [0, 1]."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrobust.errors import ModelError

FILE = "preprocessor_config.json"
_MEAN, _STD = 0.5, 0.25  # those of the reference networks, where nothing else is said


def standardisation(directory: Path, num_channels: int) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """(mean, std, notices) of preprocessor_config.json, which scales pixels of 0..255 by `rescale_factor` first.

    With r = 255 rescale_factor and o = 1 for the few that shift to [-1, 1]: ((r x - o) - mean) / std of an x in [0, 1]
    is (x - (mean + o) / r) / (std / r). Raises ModelError.
    """
    values = read_json(directory / FILE)
    if values is None:
        text = f"no {FILE} in {directory}: images are normalised by mean {_MEAN} and std {_STD}"
        return (_MEAN,) * num_channels, (_STD,) * num_channels, (text,)
    r = 255.0 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255.0
    offset = 1.0 if values.get("rescale_offset") else 0.0
    mean, std = [0.0] * num_channels, [1.0] * num_channels
    if values.get("do_normalize", True):
        mean, std = values.get("image_mean") or mean, values.get("image_std") or std
    for name, numbers in (("image_mean", mean), ("image_std", std)):
        if not isinstance(numbers, list) or len(numbers) != num_channels or not all(_is_number(n) for n in numbers):
            raise ModelError(f"{directory / FILE}: {name} is {numbers!r}, wanted {num_channels} numbers, one a channel")
    if not r > 0 or not all(number > 0 for number in std):
        raise ModelError(f"{directory / FILE}: rescale_factor {r / 255:g} and image_std {std} must be above 0")
    return tuple((number + offset) / r for number in mean), tuple(number / r for number in std), ()


def trained_side(directory: Path) -> int | None:
    """Pixels a side of the images the weights were trained on, as preprocessor_config.json knows it; None if not."""
    values = read_json(directory / FILE) or {}
    size = values.get("crop_size") if values.get("do_center_crop") else values.get("size")
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge"))
    return size if isinstance(size, int) else None


def fitted(
    image_shape: tuple[int, int, int],
    num_channels: int,
    wanted: tuple[int, int] | None,
    image_size: int | None,
    where: str,
) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """(size to resize to or None, notices) for images of `image_shape` and a network of `num_channels`.

    wanted: the (height, width) the network was made for, None for any; image_size: the side that was asked for, which
    wins. Raises ModelError for channels that do not fit.
    """
    channels, height, width = image_shape
    notices = []
    if channels not in (1, num_channels):
        raise ModelError(f"{where}: takes images of {num_channels} channels, the data set's have {channels}")
    if channels != num_channels:
        notices.append(f"gray images are repeated into {num_channels} channels inside the model")
    size = wanted if image_size is None else (image_size, image_size)
    if size == (height, width):
        size = None
    if size is not None:
        notices.append(f"images of {height} x {width} pixels are resized to {size[0]} x {size[1]} inside the model")
    return size, tuple(notices)


def read_json(path: Path) -> Mapping[str, Any] | None:
    """The object in a JSON file, None if there is no such file; ModelError if it is no object."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: wanted a JSON object, got {type(values).__name__}")
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
