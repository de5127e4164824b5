"""Laws of the assignment of rows to ranks and of the order of an epoch, for any sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distrobust.data.order import assign_rows, cut_into_pieces, epoch_order

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=8)  # rows of each row group
world_sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)
laws = settings(deadline=None, max_examples=60)


def starts_of(group_sizes):
    return np.cumsum([0, *group_sizes[:-1]])


def order_of(pieces, window, seed=0, epoch=0, rank=0, world_size=1):
    piece_rows = np.diff(pieces.start)
    return epoch_order(pieces, piece_rows, window, seed=seed, epoch=epoch, rank=rank, world_size=world_size)


@laws
@given(sizes, world_sizes, seeds, st.data())
def test_ranks_partition_the_selected_rows_evenly(group_sizes, world_size, seed, data):
    total = sum(group_sizes)
    selected = np.array(sorted(data.draw(st.sets(st.integers(0, total - 1)))), dtype=np.int64)
    parts = [assign_rows(selected, starts_of(group_sizes), rank, world_size, seed) for rank in range(world_size)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), selected)
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert all(np.all(np.diff(part) > 0) for part in parts)


@laws
@given(sizes, world_sizes, seeds)
def test_a_rank_shares_at_most_two_row_groups(group_sizes, world_size, seed):
    starts = starts_of(group_sizes)
    rows = np.arange(sum(group_sizes))
    pieces = [cut_into_pieces(assign_rows(rows, starts, rank, world_size, seed), starts) for rank in range(world_size)]
    for own in pieces:
        shared = [g for g, n in zip(own.group, np.diff(own.start), strict=True) if n < group_sizes[g]]
        assert len(shared) <= 2


@laws
@given(sizes, seeds, st.integers(1, 100))
def test_an_epoch_visits_every_position_once_window_by_window(group_sizes, seed, window):
    starts = starts_of(group_sizes)
    pieces = cut_into_pieces(np.arange(sum(group_sizes)), starts)
    order = order_of(pieces, window, seed)
    assert sorted(order.positions) == list(range(sum(group_sizes)))
    piece_of = np.searchsorted(pieces.start, order.positions, side="right") - 1
    window_of_position = order.window_of_piece[piece_of]
    assert np.all(np.diff(window_of_position) >= 0)
    rows_in_window = np.bincount(window_of_position)
    pieces_in_window = np.bincount(order.window_of_piece)
    assert np.all((rows_in_window <= window) | (pieces_in_window == 1))


def test_order_depends_on_seed_epoch_rank_and_world_size_alone():
    pieces = cut_into_pieces(np.arange(100), np.arange(0, 100, 10))
    variants = [{}, {"seed": 1}, {"epoch": 1}, {"rank": 1}, {"world_size": 2}]
    orders = [tuple(order_of(pieces, 40, **variant).positions) for variant in variants]
    assert len(set(orders)) == len(variants)
    assert orders == [tuple(order_of(pieces, 40, **variant).positions) for variant in variants]


def test_pieces_of_different_row_groups_mix_within_a_window():
    pieces = cut_into_pieces(np.arange(100), np.arange(0, 100, 10))
    first_batch = order_of(pieces, 1000).positions[:20]
    assert len(set(first_batch // 10)) > 5  # 20 of 100 at random miss more than 4 of 10 groups with p < 1e-4


def test_assignment_depends_on_the_seed():
    rows, starts = np.arange(100), np.arange(0, 100, 10)
    assert len({tuple(assign_rows(rows, starts, 0, 2, seed)) for seed in range(5)}) == 5
