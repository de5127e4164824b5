"""One pass over a parameter selects what the separate functions, one after the other, select."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distrobust.compression import accumulate, memory, native
from distrobust.compression.accumulate import Piece, accumulate_and_select
from distrobust.compression.memory import Residual, Rule
from distrobust.compression.select import SELECTORS, exact_top_k

CPU = torch.device("cpu")
selectors = st.sampled_from(list(SELECTORS))
seeds = st.integers(0, 2**32 - 1)
# powers of two: a product is exact, so that a fused multiply-add rounds like a product and a sum
rules = st.builds(Rule, st.sampled_from([0.0, 0.5]), st.booleans(), st.sampled_from([0.0, 2.0**-6]))


@pytest.fixture(autouse=True, params=["numpy", "C"])
def both_versions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler here")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 300 coordinates are several blocks, and more than a low guess leaves room for."""
    monkeypatch.setattr(accumulate, "BLOCK", 64)
    monkeypatch.setattr(accumulate, "FEW", 1)


@st.composite
def divisions(draw: st.DrawFn, n: int) -> list[Piece]:
    """Pieces of 0 to n, ascending, perhaps with gaps between them."""
    bounds = sorted(draw(st.lists(st.integers(0, n), max_size=3)))
    pieces = []
    for start, stop in zip([0, *bounds], [*bounds, n], strict=True):
        if stop > start and draw(st.sampled_from([True, True, True, False])):
            pieces.append(Piece(start, stop, draw(st.integers(1, stop - start) | st.just(1))))
    return pieces


def numbers(n: int, kind: str, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    made = {
        "normal": lambda: rng.standard_normal(n),
        "ties": lambda: rng.integers(-2, 3, n),
        "constant": lambda: np.ones(n),
        "zero": lambda: np.zeros(n),
        "sparse": lambda: rng.standard_normal(n) * (rng.random(n) < 0.05),
    }[kind]()
    return torch.from_numpy(made.astype(np.float32))


kinds = st.sampled_from(["normal", "ties", "constant", "zero", "sparse"])


def separately(residual: Residual, g: Tensor, w: Tensor, factor: float, pieces: list[Piece]) -> list[Tensor]:
    memory.accumulate(residual, memory.decayed(g, w, residual.rule, factor))
    return [exact_top_k(residual.next_v[p.start : p.stop], p.k) + p.start for p in pieces]


@given(st.integers(1, 300), kinds, seeds, rules, selectors, st.data())
def test_one_pass_equals_the_separate_functions_over_several_steps(
    n: int, kind: str, seed: int, rule: Rule, selector: str, data: st.DataObject
) -> None:
    """To the bit: coordinates, u and v. The gradient's scale jumps, so that guesses are far too low or too high."""
    ours, theirs = Residual(n, rule, CPU), Residual(n, rule, CPU)
    w = numbers(n, "normal", seed + 99)
    for step in range(4):
        g = numbers(n, kind, seed + step) * data.draw(st.sampled_from([1.0, 1.0, 2.0**10, 2.0**-10, 0.0]))
        factor = data.draw(st.sampled_from([1.0, 0.5]))
        pieces = data.draw(divisions(n))
        found = accumulate_and_select(ours, g, w, factor, pieces, selector)
        expected = separately(theirs, g, w, factor, pieces)
        assert found is not None
        assert torch.equal(ours.next_v, theirs.next_v)
        assert torch.equal(ours.next_u, theirs.next_u)
        for mine, other in zip(found, expected, strict=True):
            assert mine.indices.dtype == torch.int64
            assert torch.equal(mine.indices, other)
            assert torch.equal(mine.values, ours.next_v[other])
        for residual in (ours, theirs):
            for chosen in expected:
                memory.remove_sent(residual, chosen, residual.next_v[chosen])
            residual.commit(settled=False)


@given(st.integers(1, 300), kinds, seeds, st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.0, 1e30, math.inf]), st.data())
def test_the_guess_decides_how_fast_and_not_what_is_selected(
    n: int, kind: str, seed: int, guess: float, data: st.DataObject
) -> None:
    """Ties at the guess itself included: 'ties' holds 1 and 2, and 1 / 0.9 x 0.9 may be either side of 1."""
    pieces = data.draw(divisions(n))
    for threshold in (guess, guess / accumulate.MARGIN):
        residual, other = Residual(n, Rule(0.0), CPU), Residual(n, Rule(0.0), CPU)
        residual.threshold = threshold
        found = accumulate_and_select(residual, numbers(n, kind, seed), torch.zeros(n), 1.0, pieces, "sampled")
        expected = separately(other, numbers(n, kind, seed), torch.zeros(n), 1.0, pieces)
        assert found is not None
        assert all(torch.equal(a.indices, b) for a, b in zip(found, expected, strict=True))


def test_the_next_guess_is_the_smallest_magnitude_selected() -> None:
    residual = Residual(200, Rule(0.0), CPU)
    g = torch.arange(200.0) - 100
    accumulate_and_select(residual, g, torch.zeros(200), 1.0, [Piece(0, 100, 3), Piece(100, 200, 2)], "sampled")
    assert residual.threshold == 98.0  # -100, -99, -98 and 99, 98


@given(
    st.integers(1, 300),
    seeds,
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.sampled_from([0.0, 1e-3, 1.0, 1e30]),
    rules,
    selectors,
    st.data(),
)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(
    n: int, seed: int, poison: float, guess: float, rule: Rule, selector: str, data: st.DataObject
) -> None:
    """Also outside of every piece, and whatever the guess. u and v stay as they were."""
    residual = Residual(n, rule, CPU)
    memory.accumulate(residual, numbers(n, "normal", seed + 1))
    residual.commit(settled=False)
    residual.threshold = guess
    u, v = residual.u.clone(), residual.v.clone()
    g = numbers(n, "normal", seed)
    g[data.draw(st.integers(0, n - 1))] = poison
    assert accumulate_and_select(residual, g, torch.zeros(n), 1.0, data.draw(divisions(n)), selector) is None
    assert torch.equal(residual.u, u)
    assert torch.equal(residual.v, v)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("guess", [0.0, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("place", [5, 70, 99])
def test_a_single_one_outside_of_every_piece_is_found_too(poison: float, guess: float, place: int) -> None:
    residual = Residual(100, Rule(0.0), CPU)
    residual.threshold = guess
    g = numbers(100, "normal", 0)
    g[place] = poison
    assert accumulate_and_select(residual, g, torch.zeros(100), 1.0, [Piece(10, 60, 3)], "sampled") is None


def test_a_sum_that_overflows_is_not_finite_either() -> None:
    residual = Residual(100, Rule(0.0), CPU)
    residual.v[70] = 3e38
    g = torch.zeros(100)
    g[70] = 3e38
    for threshold in (0.0, 1.0):
        residual.threshold = threshold
        assert accumulate_and_select(residual, g, torch.zeros(100), 1.0, [Piece(0, 50, 2)], "sampled") is None


@given(st.integers(1, 300), seeds, st.booleans(), st.floats(0, 0.99), st.floats(0, 0.3), st.floats(0.01, 1.0))
def test_any_momentum_decay_and_factor_agree_to_a_few_roundings(
    n: int, seed: int, nesterov: bool, momentum: float, decay: float, factor: float
) -> None:
    """Five roundings of numbers below 32 in each: one or two fewer where torch fuses a product with a sum."""
    rule = Rule(momentum, nesterov, decay)
    ours, theirs = Residual(n, rule, CPU), Residual(n, rule, CPU)
    for residual in (ours, theirs):
        residual.v.copy_(numbers(n, "normal", seed))
        residual.u.copy_(numbers(len(residual.u), "normal", seed + 1))
    g, w = numbers(n, "normal", seed + 2), numbers(n, "normal", seed + 3)
    found = accumulate_and_select(ours, g, w, factor, [Piece(0, n, max(1, n // 9))], "sampled")
    separately(theirs, g, w, factor, [])
    torch.testing.assert_close(ours.next_v, theirs.next_v, rtol=0, atol=2 * 5 * 32 * 2.0**-24)
    torch.testing.assert_close(ours.next_u, theirs.next_u, rtol=0, atol=2 * 5 * 32 * 2.0**-24)
    assert found is not None
    assert torch.equal(found[0].indices, exact_top_k(ours.next_v, max(1, n // 9)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, 2.0**-6])
def test_gradients_and_weights_may_be_of_fewer_bits(dtype: torch.dtype, decay: float) -> None:
    """Whole numbers, so that both ways of adding them are exact."""
    g, w = (numbers(200, "ties", seed).to(dtype) for seed in (1, 2))
    ours, theirs = (Residual(200, Rule(0.5, False, decay), CPU) for _ in range(2))
    found = accumulate_and_select(ours, g, w, 1.0, [Piece(0, 200, 20)], "sampled")
    expected = separately(theirs, g, w, 1.0, [Piece(0, 200, 20)])
    assert found is not None
    assert torch.equal(found[0].indices, expected[0])
    assert torch.equal(ours.next_v, theirs.next_v)


def test_neither_the_gradient_nor_the_weight_is_changed() -> None:
    residual = Residual(200, Rule(0.5, True, 0.25), CPU)
    g, w = numbers(200, "normal", 0), numbers(200, "normal", 1)
    before = g.clone(), w.clone()
    accumulate_and_select(residual, g, w, 0.5, [Piece(0, 200, 20)], "sampled")
    assert torch.equal(g, before[0])
    assert torch.equal(w, before[1])
    assert not residual.v.any()
    assert not residual.u.any()


def test_pieces_of_one_parameter_are_selected_each_by_itself() -> None:
    """All giants lie in the first piece; the second sends its own largest all the same."""
    g = torch.cat([torch.arange(100.0) + 1000, torch.arange(100.0)])
    for threshold in (0.0, 1000.0, 1e9):
        residual = Residual(200, Rule(0.0), CPU)
        residual.threshold = threshold
        pieces = [Piece(0, 100, 2), Piece(100, 200, 3)]
        found = accumulate_and_select(residual, g, torch.zeros(200), 1.0, pieces, "sampled")
        assert found is not None
        assert [chosen.indices.tolist() for chosen in found] == [[98, 99], [197, 198, 199]]
