"""AccelAT's controller."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from distrobust.optim.accuracy_gradient import AccuracyGradient


def test_it_follows_the_authors_rule_written_out() -> None:
    """Means over the last 2: epoch 3 rises by 0.05, epoch 4 by 0.005: a cut; then two epochs of patience."""
    controller = AccuracyGradient(window=2, patience=2, threshold=0.01, factor=0.5)
    cuts = [controller.update(accuracy) for accuracy in (0.5, 0.6, 0.6, 0.61, 0.61, 0.61, 0.61)]
    assert cuts == [False, False, False, True, False, True, False]
    assert controller.rate(0.8) == 0.2


def test_steady_progress_is_left_alone() -> None:
    controller = AccuracyGradient(window=3, patience=1)
    assert not any(controller.update(0.01 * epoch) for epoch in range(40))
    assert controller.rate(0.3) == 0.3


accuracies = st.lists(st.floats(0, 1), max_size=30)


@given(accuracies, st.integers(1, 4), st.integers(1, 4))
def test_no_cut_before_the_window_has_passed_nor_within_the_patience(
    seen: list[float], window: int, patience: int
) -> None:
    controller = AccuracyGradient(window, patience)
    cuts = [epoch for epoch, accuracy in enumerate(seen, 1) if controller.update(accuracy)]
    assert cuts == controller.cuts
    assert all(epoch > window for epoch in cuts)
    assert all(later - earlier >= patience for earlier, later in pairwise(cuts))


@given(accuracies, st.floats(1e-8, 10))
def test_the_floor_holds_and_no_rate_is_raised(seen: list[float], scheduled: float) -> None:
    controller = AccuracyGradient(window=1, patience=1, factor=0.1, floor=1e-3)
    for accuracy in seen:
        controller.update(accuracy)
    assert min(scheduled, 1e-3) <= controller.rate(scheduled) <= scheduled


def test_a_loaded_state_continues() -> None:
    whole, first, second = (AccuracyGradient(window=2, patience=2) for _ in range(3))
    for epoch in range(12):
        if epoch == 5:
            second.load_state_dict(first.state_dict())
        for one in (whole, first if epoch < 5 else second):
            one.update(0.5)
    assert whole.cuts
    assert second == whole
