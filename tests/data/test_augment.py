"""Crops and flips: every output is an allowed one, all are reached, and only the generator decides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from distrobust.data import crop_and_flip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def allowed_crops(image: torch.Tensor, pad: int, flip: bool, padding: str) -> list[torch.Tensor]:
    """Every crop of one (C, H, W) image, by padding and slicing; the flipped ones after the others."""
    mode = "constant" if padding == "zero" else padding
    padded = functional.pad(image[None].float(), (pad,) * 4, mode=mode)[0].to(image.dtype)
    height, width = image.shape[1:]
    places = range(2 * pad + 1)
    crops = [padded[:, y : y + height, x : x + width] for y in places for x in places]
    return crops + [crop.flip(2) for crop in crops if flip]


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 6), st.sampled_from([1, 3]), st.integers(3, 7), st.integers(3, 7)),
    pad=st.integers(0, 2),
    flip=st.booleans(),
    padding=st.sampled_from(["zero", "reflect"]),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_every_output_is_an_allowed_crop_of_its_own_image(shape, pad, flip, padding, dtype, seed):
    images = torch.randint(1, 256, shape, generator=generator(seed)).to(dtype)
    before = images.clone()
    out = crop_and_flip(images, generator(seed), pad=pad, flip=flip, padding=padding)
    assert (out.shape, out.dtype) == (images.shape, dtype)
    for image, result in zip(images, out, strict=True):
        assert any(torch.equal(result, crop) for crop in allowed_crops(image, pad, flip, padding))
    assert torch.equal(images, before)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_all_allowed_crops_occur_about_equally_often(flip, padding):
    image = torch.arange(1, 31, dtype=torch.uint8).reshape(1, 5, 6)
    crops = allowed_crops(image, 1, flip, padding)
    out = crop_and_flip(image.expand(3600, -1, -1, -1), generator(), pad=1, flip=flip, padding=padding)
    counts = torch.stack([(out == crop).all(3).all(2).all(1) for crop in crops]).sum(1)
    assert counts.sum() == 3600
    expected = 3600 / len(crops)
    # binomial: five standard deviations, exceeded by chance with p < 1e-5 over all crops; the seed is fixed
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_no_padding_and_no_flip_is_the_identity_and_draws_nothing():
    images, source = torch.rand(4, 3, 8, 8), generator()
    before = source.get_state()
    assert crop_and_flip(images, source, pad=0, flip=False) is images
    assert torch.equal(source.get_state(), before)


def test_the_same_generator_state_gives_the_same_output():
    images = torch.rand(16, 3, 8, 8)
    source = generator(7)
    first, second = crop_and_flip(images, source), crop_and_flip(images, source)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(first, crop_and_flip(images, generator(7)))
    assert not torch.equal(first, second)


def test_uint8_and_float_images_get_the_same_crops():
    images = torch.randint(0, 256, (16, 3, 8, 8), generator=generator()).to(torch.uint8)
    as_float = crop_and_flip(images.float(), generator(1))
    assert torch.equal(crop_and_flip(images, generator(1)).float(), as_float)


def test_channels_last_images_give_the_same_values():
    images = torch.rand(4, 3, 8, 8)
    laid_out = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(crop_and_flip(images, generator()), crop_and_flip(laid_out, generator()))


def test_an_empty_batch_stays_empty():
    assert crop_and_flip(torch.zeros(0, 3, 8, 8), generator()).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("padding", ["zero", "reflect"])
def test_padding_out_of_range_is_a_programming_error(padding):
    with pytest.raises(ValueError, match="pad is -1 for images of 4x8"):
        crop_and_flip(torch.zeros(1, 1, 4, 8), generator(), pad=-1, padding=padding)


def test_reflecting_more_than_the_image_has_is_a_programming_error():
    with pytest.raises(ValueError, match="pad is 4 for images of 4x8, wanted >= 0, and less than that to reflect"):
        crop_and_flip(torch.zeros(1, 1, 4, 8), generator(), pad=4, padding="reflect")


def test_an_unknown_padding_is_a_programming_error():
    with pytest.raises(ValueError, match="padding is 'edge', wanted 'zero' or 'reflect'"):
        crop_and_flip(torch.zeros(1, 1, 4, 8), generator(), padding="edge")


@pytest.mark.gpu
def test_a_cpu_generator_gives_the_same_crops_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images = torch.rand(16, 3, 8, 8)
    assert torch.equal(crop_and_flip(images.cuda(), generator()).cpu(), crop_and_flip(images, generator()))
