"""Laws of the interval, of counts that add up, and of the reasons for distrust."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.evaluation.accuracy import MIN_SAMPLES, Counts, score, wilson

fractions = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
tuples = st.lists(st.integers(0, 50), max_size=4).map(tuple)
counts = st.builds(Counts, tuples, tuples, *[st.integers(0, 9)] * 3, st.integers(0, 100).map(float))


@given(fractions)
def test_interval_contains_the_estimate_and_stays_in_zero_one(fraction: tuple[int, int]) -> None:
    correct, n = fraction
    low, high = wilson(correct, n)
    assert 0.0 <= low <= correct / n <= high <= 1.0


@given(fractions)
def test_interval_ends_solve_wilsons_equation(fraction: tuple[int, int]) -> None:
    # The ends are the p with |correct/n - p| = z sqrt(p (1-p) / n), z = 1.95996
    correct, n = fraction
    for p in wilson(correct, n):
        if 0 < p < 1:
            assert abs(correct / n - p) == pytest.approx(1.959963985 * math.sqrt(p * (1 - p) / n), rel=1e-6)


@given(fractions)
def test_interval_is_symmetric_between_right_and_wrong(fraction: tuple[int, int]) -> None:
    correct, n = fraction
    low, high = wilson(correct, n)
    assert wilson(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_interval_of_a_published_example() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(500, 1000, confidence=0.99)
    assert high - low > wilson(500, 1000)[1] - wilson(500, 1000)[0]


@pytest.mark.parametrize(("correct", "n", "confidence"), [(-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0)])
def test_impossible_fractions_are_refused(correct: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="wilson"):
        wilson(correct, n, confidence)


@given(counts, counts)
def test_packing_commutes_with_adding(a: Counts, b: Counts) -> None:
    assert Counts.unpack(a.pack(5) + b.pack(5)) == Counts.unpack((a + b).pack(5))
    assert a.pack(5).shape == b.pack(5).shape == (14,)
    assert (a + b).correct == a.correct + b.correct
    assert (a + b).samples == (b + a).samples


@given(counts)
def test_unpack_inverts_pack(a: Counts) -> None:
    back = Counts.unpack(a.pack(4))
    padded = [(t + (0,) * 4)[:4] for t in (a.class_correct, a.class_samples)]
    assert back == dataclasses.replace(a, class_correct=padded[0], class_samples=padded[1])


def test_a_rank_without_images_changes_nothing() -> None:
    a = Counts((3, 4), (5, 5), seconds=1.0)
    assert a + Counts() == Counts() + a == a


def test_score_names_the_attack_and_is_a_record() -> None:
    result = score(Counts((600, 300), (1000, 1000)), Attack("pgd", 20), Threat("linf", 8 / 255), seed=3)
    assert result.attack == "PGD-20 Linf 8/255"
    assert (result.norm, result.steps, result.seed) == ("linf", 20, 3)
    assert (result.samples, result.correct, result.accuracy) == (2000, 900, 0.45)
    assert (result.low, result.high) == wilson(900, 2000)
    assert result.flags == ()
    assert json.loads(json.dumps(dataclasses.asdict(result)))["class_correct"] == [600, 300]


def test_score_of_clean_images_has_no_budget() -> None:
    threat = Threat("linf", 0.1)
    for attack, given_threat in ((None, None), (None, threat), (Attack("none"), threat)):
        result = score(Counts((900,), (1000,)), attack, given_threat, seed=0)
        assert (result.attack, result.norm, result.eps, result.steps) == ("clean", None, 0.0, 0)


def test_another_librarys_score_carries_its_name() -> None:
    result = score(Counts(), Attack("pgd", 20), Threat("linf", 0.1), seed=0, library="foolbox")
    assert result.attack == "PGD-20 Linf 0.1 (foolbox)"
    assert (result.accuracy, result.low, result.high) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        (Counts((1,), (MIN_SAMPLES - 1,)), "few samples: 999"),
        (Counts((1,), (MIN_SAMPLES,), zero_gradients=7), "zero gradients: the input gradient of 7 of 1000"),
        (Counts((1,), (MIN_SAMPLES,), nonfinite_gradients=2), "non-finite gradients: in .* 2 of 1000"),
        (Counts((1,), (MIN_SAMPLES,), training_mode=1), "training mode"),
    ],
)
def test_each_reason_for_distrust_raises_its_flag_alone(counts: Counts, text: str) -> None:
    import re

    (flag,) = score(counts, None, None, seed=0).flags
    assert re.match(text, flag)
