"""The laws every index code obeys, and the bits they are made of. A new code is one row of INDEX_CODES."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from harness.payloads import entropy_bits, index_sets, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distrobust.compression import bits, indices
from distrobust.compression.codec import INDEX_CODES
from distrobust.compression.select import num_selected
from distrobust.errors import CodecError

each_index_code = pytest.mark.parametrize("index_code", INDEX_CODES.values(), ids=INDEX_CODES.keys())


@given(index_sets())
def test_elias_fano_is_near_the_entropy(case: tuple[int, Tensor]) -> None:
    """Up to a density d of 1/32: l + 1 + f bits an index, f = n / (k 2^l) in [1, 2), against an entropy of log2(n/k) +
    (1 - d/2) log2(e): f - log2(f) is at most 1, so the excess is at most 2 - log2(e) + 0.023 = 0.58 bit. The constant:
    1 bit behind the unary part, a filling to whole bytes and one to eight numbers of l bits, and log2(sqrt(2 pi k))
    that Stirling leaves out.
    """
    n, chosen = case
    k = len(chosen)
    if k <= n / 32 and n < 2**30:  # above, lgamma(n) has no digits left for the difference
        constant = 1 + 7 + 7 * math.log2(n / k) + 0.5 * math.log2(2 * math.pi * k) + 1
        assert 8 * INDEX_CODES["elias_fano"].num_bytes(n, k) <= entropy_bits(n, k) + 0.6 * k + constant


@pytest.mark.parametrize("density", [0.3, 0.1, 0.03, 0.01, 0.001, 0.0001])
def test_rice_is_near_the_entropy(density: float) -> None:
    """n = 25,557,032. With c = k 2^b / n, an index takes b + 1 / (1 - e^(-1/c)) bits, of an entropy of b + log2(e / c):
    at the worst, where b and b - 1 are equally long (c = 1.04), 0.12 more. Room: 1.5 % and 4 deviations of its zeros;
    at that c 0.62 and 1.27 an index.
    """
    n = 25_557_032
    k = num_selected(n, density)
    excess = 8 * INDEX_CODES["rice"].num_bytes(n, k) / k - entropy_bits(n, k) / k
    assert excess <= 0.12 + 0.015 * 0.62 * 2 + 4 * 1.27 * 2 / math.sqrt(k)  # twice: other c


@each_index_code
@given(index_sets())
def test_indices_come_back_as_they_were(index_code: indices.IndexCode, case: tuple[int, Tensor]) -> None:
    n, chosen = case
    k = len(chosen)
    kept = index_code.keep(chosen, torch.ones(k), n)
    chosen = chosen if kept is None else chosen[kept]
    coded = index_code.encode(chosen, n, k)
    assert (coded.dtype, coded.numel()) == (torch.uint8, index_code.num_bytes(n, k))
    assert torch.equal(index_code.decode(coded, n, k), chosen)


def test_elias_fano_refuses_indices_out_of_order_or_range() -> None:
    n, k, code = 100, 3, INDEX_CODES["elias_fano"]
    good = code.encode(torch.tensor([1, 2, 99]), n, k)
    split = good.numel() - 5  # 3 indices of 5 low bits: one group of eight, 5 bytes behind the unary part
    assert torch.equal(bits.unpack(good[split:], k, 5), torch.tensor([1, 2, 3]))
    fewer = good.clone()
    fewer[:split] = 0
    with pytest.raises(CodecError, match="0 indices in a payload of 3"):
        code.decode(fewer, n, k)
    for low in ([2, 2, 3], [3, 2, 3], [1, 2, 31]):  # 1, 2 become equal, out of order; 99 becomes 127
        changed = torch.cat([good[:split], bits.pack(torch.tensor(low), 5)])
        with pytest.raises(CodecError, match="not strictly ascending below 100"):
            code.decode(changed, n, k)


def test_rice_refuses_indices_out_of_range_and_an_impossible_number_of_them() -> None:
    n, k, code = 100, 3, INDEX_CODES["rice"]
    good = code.encode(torch.tensor([1, 2, 99]), n, k)
    assert good[:2].tolist() == [3, 0]
    for count in (0, 4, 255):
        other = good.clone()
        other[0] = count
        with pytest.raises(CodecError, match=f"says it holds {count} indices, of at most 3"):
            code.decode(other, n, k)
    with pytest.raises(CodecError, match="not strictly ascending below 99"):
        code.decode(good, 99, k)
    blank = good.clone()
    blank[2:] = 0
    with pytest.raises(CodecError, match="0 indices in a payload that says 3"):
        code.decode(blank, n, k)


def test_rice_refuses_a_payload_that_ends_within_the_low_bits() -> None:
    """100 indices of 3 low bits take 39 bytes: of 63 bytes for both parts, 24 are left for the unary one, which is
    looked for in 29.
    """
    n, k, code = 1000, 100, INDEX_CODES["rice"]

    def with_the_last_one_in(byte: int) -> Tensor:
        coded = torch.zeros(code.num_bytes(n, k), dtype=torch.uint8)
        coded[0] = k
        coded[2:31] = bits.mark(torch.tensor([*range(99), 8 * byte]), 8 * 29)
        return coded

    assert code.num_bytes(n, k) == 2 + 63
    assert code.decode(with_the_last_one_in(23), n, k).tolist() == [*range(99), 99 + 8 * (8 * 23 - 99)]
    for byte in (24, 28):
        with pytest.raises(CodecError, match="ends within the low bits of 100 indices"):
            code.decode(with_the_last_one_in(byte), n, k)


def test_rice_leaves_out_next_to_nothing_of_indices_without_pattern() -> None:
    """Room for 4 standard deviations and 1.5 %: over 400 sets one or two may meet a tail that is not normal."""
    rng = np.random.default_rng(0)
    lost, total, short = 0, 0, 0
    for n, density in itertools.product([300, 20_000, 400_000], [0.0005, 0.004, 0.03, 0.2]):
        k = num_selected(n, density)
        for _ in range(33):
            chosen = torch.from_numpy(np.sort(rng.choice(n, k, replace=False)))
            kept = INDEX_CODES["rice"].keep(chosen, torch.from_numpy(rng.random(k)), n)
            lost += 0 if kept is None else k - len(kept)
            short += kept is not None
            total += k
    assert short <= 2
    assert lost <= 1e-3 * total


def patterned(kind: str, n: int, k: int, rng: np.random.Generator) -> Tensor:
    """k ascending indices below n that a code for indices without pattern does not expect."""
    gap = n // k
    low, _, _ = indices._rice_plan(n, k)
    made: dict[str, Callable[[], np.ndarray]] = {
        "one cluster": lambda: np.arange(k) + rng.integers(0, n - k + 1),
        "clusters": lambda: np.unique(rng.integers(0, n, max(1, k // 8))[:, None] + np.arange(8)),
        "at the end": lambda: np.arange(n - k, n),
        "first and rest at the end": lambda: np.concatenate([[0], np.arange(n - k + 1, n)]),
        "every gap a multiple of 2^b": lambda: np.arange(k) * ((1 << low) + 1),
        "diagonal": lambda: np.arange(k) * (gap + 1),
    }
    chosen = made[kind]()
    return torch.from_numpy(chosen[chosen < n].astype(np.int64))


@pytest.mark.parametrize(
    "kind",
    ["one cluster", "clusters", "at the end", "first and rest at the end", "every gap a multiple of 2^b", "diagonal"],
)
@given(st.integers(2, 4000), st.floats(0.001, 0.9), seeds)
def test_rice_never_overflows_and_leaves_out_only_the_smallest(kind: str, k: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = max(k, int(k / density))
    chosen = patterned(kind, n, k, rng)
    k, code = len(chosen), INDEX_CODES["rice"]
    magnitudes = torch.from_numpy(rng.exponential(1, k).astype(np.float32))
    low, _, area = indices._rice_plan(n, k)
    kept = code.keep(chosen, magnitudes, n)
    kept = torch.arange(k) if kept is None else kept
    assert len(kept) >= 1
    places = chosen[kept]
    gaps = places.diff(prepend=torch.tensor([-1])) - 1
    unary = len(kept) + int((gaps >> low).sum())
    assert bits.num_bytes(unary) + bits.packed_bytes(len(kept), low) <= area
    coded = code.encode(places, n, k)
    assert coded.numel() == code.num_bytes(n, k)
    assert torch.equal(code.decode(coded, n, k), places)
    left_out = torch.ones(k, dtype=torch.bool)
    left_out[kept] = False
    if bool(left_out.any()):
        assert float(magnitudes[left_out].max()) <= float(magnitudes[kept].min())


# ---- bits ----


@given(st.lists(st.integers(0, 1), max_size=80))
def test_bits_pack_and_unpack(flags: list[int]) -> None:
    padded = torch.tensor(flags + [0] * (-len(flags) % 8), dtype=torch.uint8)
    packed = bits.pack_bits(padded)
    assert packed.numel() == bits.num_bytes(len(padded)) == len(padded) // 8
    assert torch.equal(bits.unpack_bits(packed), padded)
    by_hand = [sum(int(b) << i for i, b in enumerate(padded[j : j + 8])) for j in range(0, len(padded), 8)]
    assert packed.tolist() == by_hand


@pytest.mark.parametrize("width", range(57))
@settings(max_examples=20)
@given(st.integers(0, 70), seeds)
def test_numbers_of_any_width_pack_and_unpack(width: int, k: int, seed: int) -> None:
    """Only the low bits count; what unpack returns fits into them."""
    rng = np.random.default_rng(seed)
    numbers = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, k, dtype=np.int64))
    packed = bits.pack(numbers, width)
    assert (packed.dtype, packed.numel()) == (torch.uint8, bits.packed_bytes(k, width))
    assert packed.numel() <= bits.num_bytes(k * width) + width  # whole groups of eight
    expected = numbers & ((1 << width) - 1)
    assert torch.equal(bits.unpack(packed, k, width), expected)
