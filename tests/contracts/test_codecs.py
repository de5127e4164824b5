"""The laws every code of a payload obeys. A new value code is one row of VALUE_CODES."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distrobust.compression import codec
from distrobust.compression.codec import VALUE_CODES, ValueCode
from distrobust.compression.memory import Residual, Rule, accumulate, remove_sent
from distrobust.compression.select import exact_top_k
from distrobust.errors import CodecError

each_code = pytest.mark.parametrize("code", VALUE_CODES.values(), ids=VALUE_CODES.keys())
FP32, FP16 = VALUE_CODES["fp32"], VALUE_CODES["fp16"]


@st.composite
def index_sets(draw: st.DrawFn) -> tuple[int, Tensor]:
    """n and k of its indices, with n also beyond what int32 and float32 can hold."""
    n = draw(st.integers(1, 40) | st.integers(1, 5000) | st.integers(1, 2**40))
    if n <= 40:
        k = draw(st.just(1) | st.just(n) | st.integers(1, n))
        chosen = set(draw(st.permutations(range(n)))[:k])
    else:
        chosen = draw(st.sets(st.sampled_from([0, n - 1]) | st.integers(0, n - 1), min_size=1, max_size=60))
    return n, torch.tensor(sorted(chosen))


def values_of(kind: str, k: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], k)
    made = {
        "normal": lambda: rng.standard_normal(k),
        "1e-30 to 1e30": lambda: signs * 10 ** rng.uniform(-30, 30, k),
        "tiny": lambda: signs * 10 ** rng.uniform(-45, -30, k),  # float32 denormals among them
        "huge": lambda: signs * 10 ** rng.uniform(30, 38.4, k),
        "zeros": lambda: np.zeros(k),
        "some zeros": lambda: rng.standard_normal(k) * (rng.random(k) < 0.5),
    }[kind]()
    return torch.from_numpy(made.astype(np.float32))


values_and_kinds = st.sampled_from(["normal", "1e-30 to 1e30", "tiny", "huge", "zeros", "some zeros"])
seeds = st.integers(0, 2**32 - 1)


@each_code
@given(index_sets(), values_and_kinds, seeds)
def test_receivers_decode_what_encode_said_they_would(
    code: ValueCode, case: tuple[int, Tensor], kind: str, seed: int
) -> None:
    n, indices = case
    k = len(indices)
    payload, sent = codec.encode(indices, values_of(kind, k, seed), n, code)
    decoded_indices, decoded_values = codec.decode(payload, n, k, code)
    assert torch.equal(decoded_indices, indices)
    assert torch.equal(decoded_values, sent)
    assert decoded_values.dtype == torch.float32


@each_code
@given(index_sets(), values_and_kinds, seeds)
def test_length_depends_on_n_and_k_alone(code: ValueCode, case: tuple[int, Tensor], kind: str, seed: int) -> None:
    n, indices = case
    payload, _ = codec.encode(indices, values_of(kind, len(indices), seed), n, code)
    assert payload.dtype == torch.uint8
    assert payload.numel() == codec.num_bytes(n, len(indices), code)


@each_code
@given(values_and_kinds, seeds, st.integers(1, 300), st.floats(0.001, 1.0), st.sampled_from([0.0, 0.5, 0.9]))
def test_sent_plus_kept_equals_accumulated(
    code: ValueCode, kind: str, seed: int, n: int, density: float, momentum: float
) -> None:
    """Exactly, for five steps: the difference of a float32 and its rounding to fewer bits is a float32 (Sterbenz)."""
    k = max(1, int(density * n))
    residual = Residual(n, Rule(momentum=momentum), torch.device("cpu"))
    for step in range(5):
        scale = 2.0**-8 if kind == "huge" else 1.0  # room to add five of them
        accumulate(residual, values_of(kind, n, seed + step) * scale)
        accumulated = residual.next_v.clone()
        indices = exact_top_k(accumulated, k)
        _, sent = codec.encode(indices, accumulated[indices], n, code)
        remove_sent(residual, indices, sent)
        total = residual.next_v.double()
        total[indices] += sent.double()
        assert torch.equal(total, accumulated.double())
        assert bool(torch.isfinite(residual.next_v).all())
        residual.commit(settled=False)


@given(st.floats(-30, 30), seeds)
def test_fp16_keeps_eleven_bits_wherever_the_largest_value_lies(exponent: float, seed: int) -> None:
    """Within 2^-13 of the largest value, half a unit in the last place is at most 2^-11 of the value itself."""
    values = values_of("normal", 200, seed).clamp(-3, 3) * 10.0**exponent
    coded = FP16.decode(FP16.encode(values))
    kept = values.abs() > values.abs().max() * 2.0**-13
    assert bool(((coded - values).abs() <= values.abs() * 2.0**-11)[kept].all())


@given(index_sets())
def test_index_length_is_near_the_entropy(case: tuple[int, Tensor]) -> None:
    """Up to a density d of 1/32: l + 1 + f bits an index, f = n / (k 2^l) in [1, 2), against an entropy of log2(n/k) +
    (1 - d/2) log2(e): f - log2(f) is at most 1, so the excess is at most 2 - log2(e) + 0.023 = 0.58 bit. The constant:
    1 bit behind the unary part, two fillings to whole bytes, and log2(sqrt(2 pi k)) that Stirling leaves out.
    """
    n, indices = case
    k = len(indices)
    if k <= n / 32 and n < 2**30:  # above, lgamma(n) has no digits left for the difference
        entropy = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
        constant = 1 + 14 + 0.5 * math.log2(2 * math.pi * k) + 1
        assert 8 * codec.index_num_bytes(n, k) <= entropy + 0.6 * k + constant


@pytest.mark.parametrize(("n", "k"), [(10**6, 10**3), (10**6, 10**4), (25_600_000, 25_600), (413_000, 4130)])
def test_index_and_value_stay_within_a_tenth_of_the_floor(n: int, k: int) -> None:
    entropy = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    assert 8 * codec.num_bytes(n, k, FP16) <= 1.1 * (entropy + 16 * k)


@each_code
@given(index_sets(), st.integers(-9, 9).filter(bool))
def test_a_payload_of_another_length_is_refused(code: ValueCode, case: tuple[int, Tensor], change: int) -> None:
    n, indices = case
    k = len(indices)
    payload, _ = codec.encode(indices, values_of("normal", k, 0), n, code)
    other = payload[:change] if change < 0 else torch.cat([payload, payload.new_zeros(change)])
    with pytest.raises(CodecError, match=rf"payload of {len(other)} bytes, expected {len(payload)} for {k} of {n}"):
        codec.decode(other, n, k, code)


def test_indices_out_of_order_or_range_are_refused_even_without_a_checksum() -> None:
    n, k = 100, 3
    good, _ = codec.encode(torch.tensor([1, 2, 99]), torch.ones(k), n, FP32)
    split = codec.index_num_bytes(n, k)
    fewer = good.clone()
    fewer[:split] = 0
    with pytest.raises(CodecError, match="0 indices in a payload of 3"):
        codec.decode(fewer, n, k, FP32)
    low = split - 2  # 3 indices x 5 low bits: 2 bytes behind the unary part
    swapped = good.clone()
    swapped[low:split] = torch.tensor([0b01000010, 0b00001100], dtype=torch.uint8)  # low bits 2, 2, 3
    with pytest.raises(CodecError, match="not strictly ascending below 100"):
        codec.decode(swapped, n, k, FP32)
    beyond = good.clone()
    beyond[low:split] = torch.tensor([0b01000001, 0b01111100], dtype=torch.uint8)  # low bits 1, 2, 31: index 127
    with pytest.raises(CodecError, match="not strictly ascending below 100"):
        codec.decode(beyond, n, k, FP32)


@given(st.lists(st.integers(0, 1), max_size=80))
def test_bits_pack_and_unpack(bits: list[int]) -> None:
    padded = torch.tensor(bits + [0] * (-len(bits) % 8), dtype=torch.uint8)
    packed = codec.pack_bits(padded)
    assert packed.numel() == len(padded) // 8
    assert torch.equal(codec.unpack_bits(packed), padded)
    by_hand = [sum(int(b) << i for i, b in enumerate(padded[j : j + 8])) for j in range(0, len(padded), 8)]
    assert packed.tolist() == by_hand
