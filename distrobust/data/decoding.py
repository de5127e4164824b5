"""Encoded images -> one uint8 array.

Pillow decodes everything; where simplejpeg is installed it decodes JPEG instead, about four times faster on
32x32 images. It runs with fast DCT and fast upsampling off, so that the pixels are Pillow's: a run must not
depend on whether an optional package is there. What it cannot decode goes to Pillow, which then also words
the error. EXIF orientation is ignored, as it is by the usual training pipelines.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from distrobust.errors import DataError

GRAY_MODES = ("1", "L", "LA", "La")
DEEP_MODES = (
    "I",
    "F",
)  # and I;16, I;16B ...: more than 8 bits a pixel, which Pillow clips instead of scaling

Shape = tuple[int, int, int]


def _import_simplejpeg() -> Any:
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


_simplejpeg = _import_simplejpeg()


def decode(encoded: Sequence[bytes | None], shape: Shape, where: Callable[[int], str]) -> NDArray[np.uint8]:
    """Decodes a slice of an image column.

    Args:
        encoded: file contents (PNG, JPEG, ...), one per image; None stands for a null.
        shape: (C, H, W) every image must have after conversion to C channels, C = 1 (gray) or 3 (RGB).
        where: names the place of `encoded[i]` ("train.parquet, row 17") for the error message.

    Returns:
        (len(encoded), C, H, W) uint8, 0 .. 255, C-contiguous.

    Raises DataError for an image that is null, does not decode, or has another size or number of channels.
    """
    channels, height, width = shape
    images = np.empty((len(encoded), height, width, channels), dtype=np.uint8)
    for i, data in enumerate(encoded):
        try:
            image = decode_one(data, channels)
        except DataError as error:
            raise DataError(f"{where(i)}: {error}") from error
        if image.shape != images.shape[1:]:
            raise DataError(
                f"{where(i)}: image of {image.shape[1]}x{image.shape[0]} pixels (width x height), but the "
                f"first one has {width}x{height}; wanted one size: resize them before writing the file"
            )
        images[i] = image
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def decode_one(data: bytes | None, channels: int | None = None) -> NDArray[np.uint8]:
    """One encoded image as (H, W, C) uint8, C = 1 for gray and 3 for RGB; `channels` forces one of them.

    RGB to gray is refused (it would lose colour silently); gray to RGB repeats the channel.
    Raises DataError saying what is wrong with the image, without its place: the caller knows that.
    """
    if data is None:
        raise DataError("image is null, wanted encoded bytes; embed the images in the file instead of their paths")
    if _simplejpeg is not None and data[:2] == b"\xff\xd8":
        fast = _decode_jpeg_fast(data, channels)
        if fast is not None:
            return fast
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _to_array(image, channels)
    except DataError:
        raise
    except Exception as error:  # bytes from anywhere: Pillow's plug-ins raise OSError, SyntaxError, struct.error, ...
        # Pillow's text names the address of the BytesIO object, which tells the reader nothing.
        reason = "not an image format Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"image does not decode ({' '.join(str(reason).split())}; {len(data)} bytes); "
            "wanted PNG, JPEG or another format Pillow reads: replace or remove the row"
        ) from error


def _to_array(image: Image.Image, channels: int | None) -> NDArray[np.uint8]:
    if image.mode in DEEP_MODES or image.mode.startswith("I;16"):
        raise DataError(f"image has mode {image.mode} (more than 8 bits a pixel), wanted 8 bits: rescale to 0 .. 255")
    gray = image.mode in GRAY_MODES
    if not gray and channels == 1:
        raise DataError(
            f"image is in colour (mode {image.mode}), but the first image is gray; "
            "pass channels=3 to read all of them as RGB"
        )
    if image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB warns about palettes with transparency
    if image.mode != "RGB" and (not gray or channels == 3):
        image = image.convert("RGB")
    elif gray and image.mode != "L":
        image = image.convert("L")
    array = np.asarray(image, dtype=np.uint8)
    return array if array.ndim == 3 else array[:, :, None]


def _decode_jpeg_fast(data: bytes, channels: int | None) -> NDArray[np.uint8] | None:
    """(H, W, C) uint8 by simplejpeg; None where Pillow must look: CMYK, damaged, colour instead of gray."""
    try:
        colours = _simplejpeg.decode_jpeg_header(data)[2]
        gray = colours == "Gray"
        if colours not in ("Gray", "RGB", "YCbCr") or (not gray and channels == 1):
            return None
        target = "GRAY" if gray and channels != 3 else "RGB"
        pixels: NDArray[np.uint8] = _simplejpeg.decode_jpeg(data, target, fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return pixels
