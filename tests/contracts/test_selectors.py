"""The laws every selector obeys. A new selector is one row of SELECTORS."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distrobust.compression import select
from distrobust.compression.select import SELECTORS, Selector, num_selected

each_selector = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS.keys())


def by_definition(values: Tensor, k: int) -> list[int]:
    """Largest magnitude first, among equals the lowest index first; the first k, ascending."""
    order = sorted(range(values.numel()), key=lambda i: (-abs(float(values[i])), i))
    return sorted(order[:k])


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Values with heavy ties, constants, zeros, huge ranges or none of it; any k from 1 to n."""
    n = draw(st.integers(1, 1500))
    seed = draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["normal", "heavy tail", "ties", "constant", "zero", "sparse"]))
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.standard_normal(n),
        "heavy tail": lambda: np.exp(rng.uniform(-60, 60, n)) * rng.choice([-1, 1], n),
        "ties": lambda: rng.integers(-2, 3, n),
        "constant": lambda: np.full(n, rng.choice([-3.5, 1e-30, 2.0])),
        "zero": lambda: np.zeros(n),
        "sparse": lambda: rng.standard_normal(n) * (rng.random(n) < 0.05),
    }[kind]()
    k = draw(st.one_of(st.integers(1, n), st.sampled_from([1, n, max(1, n // 2)])))
    return torch.from_numpy(values.astype(np.float32)), k


@each_selector
@given(tensors())
def test_the_k_largest_magnitudes_ties_to_the_lowest_index(selector: Selector, case: tuple[Tensor, int]) -> None:
    values, k = case
    chosen = selector(values, k)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == by_definition(values, k)


@each_selector
@given(tensors())
def test_values_are_not_changed(selector: Selector, case: tuple[Tensor, int]) -> None:
    values, k = case
    before = values.clone()
    selector(values, k)
    assert torch.equal(values, before)


@each_selector
@given(tensors())
def test_sign_does_not_matter(selector: Selector, case: tuple[Tensor, int]) -> None:
    values, k = case
    assert torch.equal(selector(values, k), selector(-values, k))


@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "sample sees only zeros", "sample sees only giants"])
@pytest.mark.parametrize("k", [200, 2_000, 20_000])
def test_sampled_equals_exact_where_it_samples(kind: str, k: int) -> None:
    n = 100_000
    stride = min(select.SAMPLE_STRIDE, k // select.SAMPLE_HITS, n // k)
    assert stride >= 2  # below, there is no sampling to test
    rng = np.random.default_rng(k)
    values = rng.standard_normal(n)
    if kind == "ties":
        values = np.round(values, 1)
    elif kind == "sorted":
        values = np.sort(values)
    elif kind == "sample sees only zeros":
        values[::stride] = 0
    elif kind == "sample sees only giants":
        values[::stride] = 1e6 + rng.random(len(values[::stride]))
    tensor = torch.from_numpy(values.astype(np.float32))
    assert torch.equal(select.sampled_top_k(tensor, k), select.exact_top_k(tensor, k))


@given(st.integers(1, 10**9), st.floats(1e-9, 1.0))
def test_number_selected_is_between_one_and_n_and_near_density_times_n(n: int, density: float) -> None:
    k = num_selected(n, density)
    assert 1 <= k <= n
    assert k == 1 or abs(k - n * density) <= 0.5 + 1e-6
