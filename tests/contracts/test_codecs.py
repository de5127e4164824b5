"""The laws every code of a payload obeys. A new code is one row of VALUE_CODES or INDEX_CODES."""

import itertools
import math

import numpy as np
import pytest
import torch
from harness.payloads import (
    block_lists,
    entropy_bits,
    index_sets,
    joined,
    kinds,
    resnet50,
    resnet50_space,
    seeds,
    values_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distrobust.compression import codec, indices
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES, Code, Space
from distrobust.compression.memory import Residual, Rule, accumulate, remove_sent
from distrobust.compression.select import exact_top_k, num_selected
from distrobust.compression.values import LARGEST
from distrobust.errors import CodecError

CODES = {f"{v}-{i}": Code(VALUE_CODES[v], INDEX_CODES[i]) for v in VALUE_CODES for i in INDEX_CODES}
each_code = pytest.mark.parametrize("code", CODES.values(), ids=CODES.keys())
each_index_code = pytest.mark.parametrize("index_code", INDEX_CODES.values(), ids=INDEX_CODES.keys())
each_value_code = pytest.mark.parametrize("name", VALUE_CODES)
EXACT = ("fp32", "fp16", "bf16")  # fewer bits of the same number: what is cut off is a float32 itself
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "4bit": 4, "2bit": 2, "sign": 1}
few = settings(max_examples=15)  # of each of fourteen codes


def is_subset(some: Tensor, of: Tensor) -> bool:
    return bool(torch.isin(some, of).all())


# ---- payloads, over every pair of codes ----


@each_code
@few
@given(block_lists(), kinds)
def test_receivers_decode_what_encode_said_they_would(
    code: Code, case: tuple[list[tuple[int, Tensor]], int], kind: str
) -> None:
    blocks, seed = case
    space, chosen = joined(blocks)
    payload, kept, sent = codec.encode(chosen, values_of(kind, space.k, seed), space, code)
    decoded_indices, decoded_values = codec.decode(payload, space, code)
    assert torch.equal(decoded_indices, kept)
    assert torch.equal(decoded_values, sent)
    assert decoded_values.dtype == torch.float32
    assert len(kept) >= 1
    assert is_subset(kept, chosen)
    assert code.indices.name == "rice" or torch.equal(kept, chosen)


@each_code
@few
@given(index_sets(), kinds, seeds)
def test_one_block_of_any_size_is_decoded_too(code: Code, case: tuple[int, Tensor], kind: str, seed: int) -> None:
    n, chosen = case
    space = Space(n, (len(chosen),))
    payload, kept, sent = codec.encode(chosen, values_of(kind, len(chosen), seed), space, code)
    decoded_indices, decoded_values = codec.decode(payload, space, code)
    assert torch.equal(decoded_indices, kept)
    assert torch.equal(decoded_values, sent)


@each_code
@few
@given(block_lists(), kinds)
def test_length_depends_on_the_space_alone(code: Code, case: tuple[list[tuple[int, Tensor]], int], kind: str) -> None:
    blocks, seed = case
    space, chosen = joined(blocks)
    payload, _, _ = codec.encode(chosen, values_of(kind, space.k, seed), space, code)
    assert payload.dtype == torch.uint8
    assert payload.numel() == codec.num_bytes(space, code)


@each_code
@few
@given(block_lists(), kinds)
def test_values_are_finite_and_no_larger_than_twice_the_largest_of_their_block(
    code: Code, case: tuple[list[tuple[int, Tensor]], int], kind: str
) -> None:
    """Twice: the highest level of a few, next to the largest value, and a scale rounded up. 1e-40: bf16's smallest
    scale.
    """
    blocks, seed = case
    space, chosen = joined(blocks)
    values = values_of(kind, space.k, seed)
    _, kept, sent = codec.encode(chosen, values, space, code)
    assert bool(torch.isfinite(sent).all())
    ends = torch.tensor([*space.starts, space.n])
    for start, end in itertools.pairwise(ends):
        before, after = ((chosen >= start) & (chosen < end)), ((kept >= start) & (kept < end))
        largest = float(values[before].abs().max())
        assert bool((sent[after].abs() <= max(2 * largest, 1e-40)).all())


@each_code
@few
@given(kinds, seeds, st.lists(st.integers(1, 300), min_size=1, max_size=3), st.floats(0.001, 1.0))
def test_sent_plus_kept_equals_accumulated(code: Code, kind: str, seed: int, sizes: list[int], density: float) -> None:
    """For five steps. fp32, fp16, bf16: exactly, since the difference of a float32 and its rounding to fewer bits is a
    float32 (Sterbenz). Scaled codes: `kept` is the difference rounded once, by at most 2^-24 of it, or half of the
    smallest denormal, 2^-150.
    """
    starts = tuple(sum(sizes[:i]) for i in range(len(sizes)))
    counts = tuple(num_selected(n, density) for n in sizes)
    space = Space(sum(sizes), counts, starts)
    residual = Residual(space.n, Rule(momentum=seed % 2 * 0.5), torch.device("cpu"))
    for step in range(5):
        scale = 2.0**-8 if kind in ("huge", "everything") else 1.0  # room to add five of them
        accumulate(residual, values_of(kind, space.n, seed + step) * scale)
        accumulated = residual.next_v.clone()
        pieces = zip(accumulated.split(sizes), counts, starts, strict=True)
        chosen = torch.cat([exact_top_k(piece, k) + start for piece, k, start in pieces])
        _, kept, sent = codec.encode(chosen, accumulated[chosen], space, code)
        remove_sent(residual, kept, sent)
        left = accumulated.double()
        left[kept] -= sent.double()
        difference = (residual.next_v.double() - left).abs()
        if code.values.name in EXACT:
            assert not bool(difference.any())
        assert bool((difference <= 2.0**-24 * left.abs() + 2.0**-150).all())
        assert bool(torch.isfinite(residual.next_v).all())
        residual.commit(settled=False)


@each_code
@few
@given(block_lists(), st.integers(-9, 9).filter(bool))
def test_a_payload_of_another_length_is_refused(
    code: Code, case: tuple[list[tuple[int, Tensor]], int], change: int
) -> None:
    space, chosen = joined(case[0])
    payload, _, _ = codec.encode(chosen, values_of("normal", space.k, 0), space, code)
    other = payload[:change] if change < 0 else torch.cat([payload, payload.new_zeros(change)])
    text = rf"payload of {len(other)} bytes, expected {len(payload)} for {space.k} of {space.n}"
    with pytest.raises(CodecError, match=text):
        codec.decode(other, space, code)


@each_code
@few
@given(block_lists(most=3), seeds)
def test_noise_is_refused_or_decodes_to_ascending_indices_in_range(
    code: Code, case: tuple[list[tuple[int, Tensor]], int], seed: int
) -> None:
    """Behind the checksum, which noise passes once in 2^32: nothing else may be raised, and nothing out of range
    written.
    """
    space, _ = joined(case[0])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (codec.num_bytes(space, code),), generator=generator, dtype=torch.uint8)
    try:
        decoded, values = codec.decode(noise, space, code)
    except CodecError:
        return
    assert decoded.numel() == values.numel()
    assert decoded.numel() <= space.k
    assert bool((decoded.diff() > 0).all())
    assert 0 <= int(decoded[0]) <= int(decoded[-1]) < space.n


@each_value_code
@few
@given(block_lists(), kinds, st.data())
def test_values_do_not_depend_on_how_blocks_are_put_into_messages(
    name: str, case: tuple[list[tuple[int, Tensor]], int], kind: str, data: st.DataObject
) -> None:
    """To the bit. Elias-Fano, which leaves nothing out."""
    blocks, seed = case
    code = Code(VALUE_CODES[name], INDEX_CODES["elias_fano"])
    sizes = [len(chosen) for _, chosen in blocks]
    # the magnitudes of one block say nothing about the next one's
    scales = [10.0 ** data.draw(st.sampled_from([0, -20, 12])) for _ in blocks] if kind == "normal" else [1.0] * 9
    values = [values_of(kind, k, seed + i) * scales[i] for i, k in enumerate(sizes)]
    alone = []
    for block, own in zip(blocks, values, strict=True):
        space, chosen = joined([block])
        alone.append(codec.encode(chosen, own, space, code)[2])
    cut = data.draw(st.integers(0, len(blocks)))
    for first, last in ((0, cut), (cut, len(blocks))):
        if first < last:
            space, chosen = joined(blocks[first:last])
            together = codec.encode(chosen, torch.cat(values[first:last]), space, code)[2]
            assert torch.equal(together, torch.cat(alone[first:last]))


# ---- value codes ----


@given(st.floats(-30, 30), seeds)
def test_fp16_keeps_eleven_bits_wherever_the_largest_value_lies(exponent: float, seed: int) -> None:
    """Within 2^-13 of the largest value, half a unit in the last place is at most 2^-11 of the value itself."""
    values = values_of("normal", 200, seed).clamp(-3, 3) * 10.0**exponent
    _, _, coded = codec.encode(torch.arange(200), values, Space(200, (200,)), Code(VALUE_CODES["fp16"]))
    kept = values.abs() > values.abs().max() * 2.0**-13
    assert bool(((coded - values).abs() <= values.abs() * 2.0**-11)[kept].all())


def relative_error(name: str, values: Tensor) -> float:
    k = len(values)
    _, _, coded = codec.encode(torch.arange(k), values, Space(k, (k,)), Code(VALUE_CODES[name]))
    return float((coded - values).double().norm() / values.double().norm())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_errors_of_the_value_codes_on_a_heavy_tail(seed: int, scale: float) -> None:
    """20,000 magnitudes 1 + E with E exponential: mean square 5, largest about 1 + ln 20,000 = 10.9, once in 20 13.

    Uniform rounding with step D has the error D / sqrt(12). int8: D = 13 (1 + 2^-7) / 127. L fitted levels have, for a
    density f, at best (integral of f^(1/3))^3 / (12 L^2) = 27 / (12 L^2) (Panter and Dite 1951), from above for L >= 2;
    fitting to 512 of them costs some per cent. One level: the deviation of E, 1. bf16 rounds to 2^-9 at most, fp16
    2^-12 but for the bits above the largest value.
    """
    values = values_of("heavy tail", 20_000, seed) * scale
    errors = {name: relative_error(name, values) for name in VALUE_CODES}
    bounds = {
        "fp32": 0.0,
        "fp16": 2.0**-11,
        "bf16": 2.0**-9,
        "int8": 13 * (1 + 2.0**-7) / 127 / math.sqrt(12 * 5),
        "4bit": 1.05 * math.sqrt(27 / (12 * 8**2) / 5),
        "2bit": 1.05 * math.sqrt(27 / (12 * 2**2) / 5),
        "sign": 1.02 / math.sqrt(5),
    }
    assert all(errors[name] <= bounds[name] for name in VALUE_CODES), errors
    assert list(errors.values()) == sorted(errors.values())  # each with more bits than the next
    top = values.abs().max()
    grid = (values.abs() / top * 8).floor().clamp(max=7).add(0.5) / 8 * top
    uniform = float((grid - values.abs()).norm() / values.norm())
    assert errors["4bit"] < uniform / 2


@pytest.mark.parametrize("name", ["4bit", "2bit"])
@pytest.mark.parametrize("k", [20, 511])
def test_blocks_too_small_to_be_fitted_are_coded_nearly_as_well(name: str, k: int) -> None:
    """With the levels of a typical block; over 200 blocks, whose means differ from it by 1 / sqrt(k)."""
    num_levels = {"4bit": 8, "2bit": 2}[name]
    errors = [relative_error(name, values_of("heavy tail", k, seed)) for seed in range(200)]
    assert np.mean(errors) < 1.2 * math.sqrt(27 / (12 * num_levels**2) / 5)


@pytest.mark.parametrize("name", ["4bit", "2bit", "int8"])
def test_a_giant_leaves_the_residual_within_a_few_steps(name: str) -> None:
    """70,000 ones and a value of 1e9, as after a spike: 70,000 times the mean, which is beyond fp16, the type of
    levels.
    """
    k = 70_000
    left = torch.ones(k)
    left[0] = 1e9
    for _ in range(12):
        _, _, sent = codec.encode(torch.arange(k), left, Space(k, (k,)), Code(VALUE_CODES[name]))
        left = left - sent
    assert float(left.abs().max()) < 1e8


ABOVE = {(0.01, "sign"), (0.0001, "2bit"), (0.0001, "sign")}  # Elias-Fano: half a bit too much beside so few


@pytest.mark.parametrize("density", [0.01, 0.001, 0.0001])
@each_value_code
@each_index_code
def test_a_payload_is_within_a_twentieth_of_the_floor(index_code: indices.IndexCode, name: str, density: float) -> None:
    """Entropy of the index and bits of the value; all scales, tables and fillings included. Elias-Fano: within 6 %."""
    space = resnet50_space(density)
    assert (space.n, len(space.counts)) == (25_557_032, 55)
    floor = entropy_bits(space.n, space.k) + BITS[name] * space.k
    got = 8 * codec.num_bytes(space, Code(VALUE_CODES[name], index_code))
    above = index_code.name == "elias_fano" and (density, name) in ABOVE
    assert floor <= got <= (1.06 if above else 1.05) * floor
    assert (got > 1.05 * floor) == above


def test_more_indices_in_a_block_than_planned_are_refused() -> None:
    made = Space(100, (2, 1), (0, 50))
    read = Space(100, (1, 2), (0, 50))
    for code in (Code(VALUE_CODES["fp32"], index_code) for index_code in INDEX_CODES.values()):
        payload, _, _ = codec.encode(torch.tensor([3, 7, 60]), torch.ones(3), made, code)
        with pytest.raises(CodecError, match=r"blocks of \[2, 1\] values, expected at most \[1, 2\]"):
            codec.decode(payload, read, code)


def test_rice_keeps_every_index_of_a_large_network() -> None:
    space = resnet50_space(0.001)
    g = torch.Generator().manual_seed(0)
    pieces = []
    for start, n, k in zip(space.starts, resnet50(), space.counts, strict=True):
        pieces.append(torch.randperm(n, generator=g)[:k].sort().values + start)
    chosen = torch.cat(pieces)
    values = values_of("heavy tail", space.k, 0)
    for name in ("fp16", "4bit"):
        code = Code(VALUE_CODES[name], INDEX_CODES["rice"])
        payload, kept, sent = codec.encode(chosen, values, space, code)
        assert torch.equal(kept, chosen)
        decoded, received = codec.decode(payload, space, code)
        assert torch.equal(decoded, chosen)
        assert torch.equal(received, sent)


@settings(max_examples=10)
@given(block_lists())
def test_decoding_changes_no_byte_of_the_payload(case: tuple[list[tuple[int, Tensor]], int]) -> None:
    space, chosen = joined(case[0])
    for code in CODES.values():
        payload, _, _ = codec.encode(chosen, values_of("normal", space.k, 0), space, code)
        before = payload.clone()
        codec.decode(payload, space, code)
        assert torch.equal(payload, before)


def test_the_largest_float_stays_finite() -> None:
    values = torch.full((40,), LARGEST)
    for name, value_code in VALUE_CODES.items():
        _, _, sent = codec.encode(torch.arange(40), values, Space(40, (40,)), Code(value_code))
        assert bool(torch.isfinite(sent).all()), name
