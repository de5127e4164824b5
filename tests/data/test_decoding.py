"""Encoded images -> uint8, whatever the mode, and what is said about those that do not decode."""

from __future__ import annotations

import io
import types

import numpy as np
import pytest
from PIL import Image

from distrobust.data import decode, decoding
from distrobust.data.decoding import decode_one
from distrobust.errors import DataError


@pytest.fixture
def picture():
    """(16, 24, 3) uint8: smooth, so that JPEG keeps it closely; every channel differs."""
    y, x = np.mgrid[0:16, 0:24]
    return np.stack([8 * y + x, 4 * y + 5 * x, 250 - 9 * x], axis=2).astype(np.uint8)


def encoded(array, format="PNG", mode=None, **options) -> bytes:
    image = Image.fromarray(array)
    buffer = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(buffer, format, **options)
    return buffer.getvalue()


def nowhere(index: int) -> str:
    return f"place {index}"


def test_png_is_decoded_exactly_and_in_order(picture):
    images = [picture, picture[::-1], 255 - picture]
    decoded = decode([encoded(image) for image in images], (3, 16, 24), nowhere)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, np.stack(images).transpose(0, 3, 1, 2))


def test_no_images_decode_to_none():
    assert decode([], (3, 16, 24), nowhere).shape == (0, 3, 16, 24)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr"])
def test_colour_of_any_mode_becomes_rgb(picture, mode):
    format = {"CMYK": "TIFF", "YCbCr": "TIFF"}.get(mode, "PNG")
    decoded = decode_one(encoded(picture, format, mode))
    assert decoded.shape == (16, 24, 3)
    # a palette of 256 colours and the 8-bit YCbCr round trip move values a little; swapped channels would
    # by > 100
    assert np.abs(decoded.astype(int) - picture).mean() < 20


def test_a_palette_with_transparency_decodes_without_a_warning(picture):
    data = encoded(picture, "PNG", "P", transparency=bytes([0, 128]))
    assert decode_one(data).shape == (16, 24, 3)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_gray_of_any_mode_stays_one_channel(picture, mode):
    assert decode_one(encoded(picture, "PNG", mode)).shape == (16, 24, 1)


def test_black_and_white_spans_the_full_range(picture):
    assert set(np.unique(decode_one(encoded(picture, "PNG", "1")))) == {0, 255}


def test_gray_among_colour_repeats_its_channel(picture):
    decoded = decode([encoded(picture), encoded(picture[:, :, 0])], (3, 16, 24), nowhere)
    for channel in range(3):
        np.testing.assert_array_equal(decoded[1, channel], picture[:, :, 0])


def test_colour_among_gray_is_refused(picture):
    with pytest.raises(DataError, match=r"place 1: image is in colour \(mode RGB\).*pass channels=3"):
        decode([encoded(picture[:, :, 0]), encoded(picture)], (1, 16, 24), nowhere)


def test_sixteen_bit_images_are_refused():
    data = encoded(np.full((4, 4), 40_000, dtype=np.uint16))
    with pytest.raises(DataError, match=r"mode I;16 \(more than 8 bits a pixel\), wanted 8 bits"):
        decode_one(data)


def test_another_size_is_refused_by_place(picture):
    with pytest.raises(DataError, match=r"place 1: image of 20x16 pixels .*first one has 24x16; wanted one size"):
        decode([encoded(picture), encoded(picture[:, :20])], (3, 16, 24), nowhere)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("kept", [0, 1, 20, 60])
def test_a_truncated_image_is_refused_by_place(picture, format, kept):
    whole = encoded(picture, format)
    match = rf"place 1: image does not decode \(.*; {kept} bytes\)"
    with pytest.raises(DataError, match=match) as caught:
        decode([whole, whole[:kept]], (3, 16, 24), nowhere)
    assert "BytesIO" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_never_decodes_to_other_pixels(format):
    whole = encoded(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8), format)
    expected = decode_one(whole)
    refused = 0
    for length in range(0, len(whole), 9):
        try:
            np.testing.assert_array_equal(decode_one(whole[:length]), expected)
        except DataError:
            refused += 1
    assert refused > 0.9 * len(whole) / 9  # without the last few bytes all pixels are there


def test_a_null_image_is_refused_by_place(picture):
    with pytest.raises(DataError, match="place 1: image is null, wanted encoded bytes; embed the images"):
        decode([encoded(picture), None], (3, 16, 24), nowhere)


def test_simplejpeg_gives_the_pixels_of_pillow(picture, monkeypatch):
    pytest.importorskip("simplejpeg", reason="the optional JPEG decoder simplejpeg is not installed")
    noise = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
    images = [encoded(a, "JPEG", mode) for a in (picture, noise) for mode in ("RGB", "L", "CMYK")]
    fast = [decode_one(data, 3) for data in images]
    monkeypatch.setattr(decoding, "_simplejpeg", None)
    for data, pixels in zip(images, fast, strict=True):
        np.testing.assert_array_equal(pixels, decode_one(data, 3))


def fake_simplejpeg(colours, pixels):
    """As the real one, which the development environment does not need: answers with `pixels`, or raises."""

    def decode_jpeg(data, target, fastdct, fastupsample):
        if pixels is None:
            raise ValueError("Premature end of JPEG file")
        assert (target, fastdct, fastupsample) == ("GRAY" if pixels.shape[2] == 1 else "RGB", False, False)
        return pixels

    return types.SimpleNamespace(decode_jpeg_header=lambda data: (16, 24, colours, "444"), decode_jpeg=decode_jpeg)


@pytest.mark.parametrize(("colours", "channels", "depth"), [("YCbCr", None, 3), ("Gray", None, 1), ("Gray", 3, 3)])
def test_jpeg_goes_to_simplejpeg_where_it_is_installed(picture, monkeypatch, colours, channels, depth):
    marked = np.full((16, 24, depth), 77, dtype=np.uint8)
    monkeypatch.setattr(decoding, "_simplejpeg", fake_simplejpeg(colours, marked))
    assert decode_one(encoded(picture, "JPEG"), channels) is marked
    assert decode_one(encoded(picture, "PNG"), channels) is not marked


@pytest.mark.parametrize("colours", ["CMYK", "YCCK", "YCbCr"])
def test_what_simplejpeg_does_not_decode_goes_to_pillow(picture, monkeypatch, colours):
    monkeypatch.setattr(decoding, "_simplejpeg", fake_simplejpeg(colours, None))
    assert decode_one(encoded(picture, "JPEG")).shape == (16, 24, 3)
