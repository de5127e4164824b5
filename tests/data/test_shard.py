"""Batches of a rank: how many, of what, in which order, and that the cache mode cannot be seen in them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrobust.data import Shard, describe, shard, split_held_out
from distrobust.data.stream import RowStream
from distrobust.errors import ConfigError, DataError

CACHES = ("memory", "stream")


def rows_of(images: torch.Tensor) -> list[int]:
    """The row numbers that write_numbered put into the images."""
    return (images[:, 0, 0, 0].long() + 256 * images[:, 0, 0, 1].long()).tolist()


def equal(left, right) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(left, right, strict=True)
    )


@pytest.fixture
def source(tmp_path, write_numbered):
    return describe(write_numbered(tmp_path, 300, 16), "train")


@pytest.fixture
def small_windows(monkeypatch):
    """About two row groups of 16 numbered images a window, instead of everything."""
    monkeypatch.setattr(shard, "WINDOW_BYTES", 2500)


@pytest.mark.parametrize("cache", CACHES)
def test_batches_are_uint8_images_with_their_own_labels(source, cache):
    for images, labels in Shard(source, 0, 2, seed=0, cache=cache).batches(epoch=0, global_batch=20):
        assert (images.shape, images.dtype) == ((10, 3, 2, 3), torch.uint8)
        assert (labels.shape, labels.dtype) == ((10,), torch.int64)
        assert labels.tolist() == [row % 5 for row in rows_of(images)]


@settings(deadline=None, max_examples=25)
@given(
    num_rows=st.integers(1, 60),
    row_group_size=st.integers(1, 70),
    world_size=st.integers(1, 5),
    batch=st.integers(1, 6),
    window=st.sampled_from([1, 500, 10**9]),
    held_out=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_rank_makes_equal_steps_over_disjoint_rows_in_either_mode(
    write_numbered, num_rows, row_group_size, world_size, batch, window, held_out, seed
):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "WINDOW_BYTES", window)
        source = describe(write_numbered(Path(folder), num_rows, row_group_size), "train")
        part = split_held_out(source, 0.3, seed)[0] if held_out and num_rows > 3 else None
        available = num_rows if part is None else part.num_rows
        evaluated, visited = [], []
        for rank in range(world_size):
            memory, stream = (Shard(source, rank, world_size, seed, cache=cache, rows=part) for cache in CACHES)
            assert equal(memory.in_order(batch), stream.in_order(batch))
            in_order = [row for images, _ in stream.in_order(batch) for row in rows_of(images)]
            assert in_order == memory.rows.tolist()
            evaluated += in_order
            if world_size * batch > available:
                continue
            batches = list(memory.batches(1, world_size * batch))
            assert len(batches) == memory.num_steps(world_size * batch) == available // (world_size * batch)
            assert all(len(labels) == batch for _, labels in batches)
            assert equal(batches, stream.batches(1, world_size * batch))
            visited += [row for images, _ in batches for row in rows_of(images)]
        assert len(set(visited)) == len(visited)
        assert sorted(evaluated) == list(range(num_rows) if part is None else part.rows())


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("start_step", [1, 7, 14, 15])
@pytest.mark.usefixtures("small_windows")
def test_resuming_gives_the_remaining_batches_bit_for_bit(source, cache, start_step):
    whole = list(Shard(source, 1, 2, seed=5, cache=cache).batches(3, 20))
    resumed = Shard(source, 1, 2, seed=5, cache=cache).batches(3, 20, start_step)
    assert equal(whole[start_step:], resumed)


@pytest.mark.usefixtures("small_windows")
def test_resuming_decodes_only_what_is_left(source, monkeypatch):
    fetched = []
    fetch = RowStream.fetch
    monkeypatch.setattr(RowStream, "fetch", lambda self, rows: fetched.extend(rows) or fetch(self, rows))
    list(Shard(source, 0, 1, seed=0, cache="stream").batches(0, 20, start_step=12))
    assert len(fetched) == 300 - 12 * 20


@pytest.mark.usefixtures("small_windows")
def test_streaming_holds_at_most_two_windows(source, monkeypatch):
    held = []
    hold = RowStream._hold

    def watched(self, needed):
        hold(self, needed)
        held.append(sum(len(images) for images in self._held.values()))

    monkeypatch.setattr(RowStream, "_hold", watched)
    largest = max(group.encoded_bytes / group.num_rows for group in source.row_groups)
    smallest = min(group.encoded_bytes / group.num_rows for group in source.row_groups)
    assert largest < 1.2 * smallest  # so that rows stand for bytes below
    list(Shard(source, 0, 1, seed=0, cache="stream").batches(0, 4))
    assert 16 < max(held) <= 2 * 2500 / smallest < 150
    held.clear()
    list(Shard(source, 0, 1, seed=0, cache="stream").in_order(4))
    assert max(held) == 16


def test_each_epoch_has_its_own_order_and_seed_its_own_rows(source):
    def order(seed=0, epoch=0):
        batches = Shard(source, 0, 2, seed).batches(epoch, 20)
        return tuple(row for images, _ in batches for row in rows_of(images))

    assert order() == order()
    assert order(epoch=1) != order()
    assert set(order(epoch=1)) == set(order())  # 150 rows of the rank in 15 full batches: the same every epoch
    assert set(order(seed=1)) != set(order())


def test_a_whole_window_is_shuffled_together(source):
    images, _ = next(Shard(source, 0, 1, seed=0).batches(0, 60))
    # 60 of 300 at random rows meet all but a few of the 19 row groups
    assert len({row // 16 for row in rows_of(images)}) > 12


def test_one_rank_reads_the_files_in_order(source):
    rows = [row for images, _ in Shard(source, 0, 1, seed=9).in_order(64) for row in rows_of(images)]
    assert rows == list(range(300))


def test_in_order_ends_with_a_smaller_batch(source):
    assert [len(labels) for _, labels in Shard(source, 0, 1, seed=0).in_order(128)] == [128, 128, 44]


def test_changing_a_batch_in_place_does_not_change_the_cache(source):
    shard = Shard(source, 0, 1, seed=0, cache="memory")
    before = [images.clone() for images, _ in shard.in_order(100)]
    for images, labels in (*shard.in_order(100), *shard.batches(0, 100)):
        images.zero_()
        labels.zero_()
    assert equal(zip(before, before, strict=True), ((images, images) for images, _ in shard.in_order(100)))
    assert next(shard.in_order(6))[1].tolist() == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(("world_size", "limit", "in_memory"), [(1, 5400, True), (1, 5399, False), (2, 2700, True)])
def test_auto_keeps_in_memory_what_fits_decoded(source, world_size, limit, in_memory):
    assert source.row_bytes * 300 == 5400
    assert Shard(source, 0, world_size, seed=0, memory_limit_bytes=limit).in_memory is in_memory


def test_more_ranks_than_rows_leaves_some_without(tmp_path, write_numbered):
    source = describe(write_numbered(tmp_path, 2, 2), "train")
    for cache in CACHES:
        shards = [Shard(source, rank, 5, seed=0, cache=cache) for rank in range(5)]
        assert sorted(row for shard in shards for images, _ in shard.in_order(4) for row in rows_of(images)) == [0, 1]


@pytest.mark.parametrize(("global_batch", "nearest"), [(7, 8), (0, 4), (-4, 4), (1, 4)])
def test_a_global_batch_the_workers_cannot_share_is_refused(source, global_batch, nearest):
    match = f"size is {global_batch}, wanted a positive multiple of the number of workers, 4; try {nearest}"
    with pytest.raises(ConfigError, match=match):
        Shard(source, 0, 4, seed=0).num_steps(global_batch)


def test_a_global_batch_larger_than_the_data_is_refused_before_iterating(source):
    with pytest.raises(ConfigError, match="global batch size is 303, but there are only 300 rows; wanted at most 300"):
        Shard(source, 0, 3, seed=0).batches(0, 303)


@pytest.mark.parametrize("start_step", [-1, 16])
def test_a_start_step_beyond_the_epoch_is_a_programming_error(source, start_step):
    with pytest.raises(ValueError, match=rf"start_step is {start_step}, wanted 0 \.\. 15"):
        Shard(source, 0, 1, seed=0).batches(0, 20, start_step)


def test_an_unknown_cache_mode_is_refused(source):
    with pytest.raises(ConfigError, match="data cache is 'disk', wanted one of auto, memory, stream"):
        Shard(source, 0, 1, seed=0, cache="disk")


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_a_programming_error(source, rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not below world_size 2"):
        Shard(source, rank, 2, seed=0)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (b"junk", "image does not decode"),
        (None, "image is null"),
        ("other size", "image of 9x2 pixels"),
    ],
)
def test_a_damaged_image_is_named_by_file_and_row(write_table, png, cache, damaged, reason):
    for number in range(2):
        images = [png()] * 5
        if number == 1:
            images[3] = png(width=9) if damaged == "other size" else damaged
        name = f"train-0000{number}-of-00002.parquet"
        directory = write_table(images, labels=[0] * 5, name=name, row_group_size=2, write_statistics=False)
    source = describe(directory, "train")
    match = rf"train-00001-of-00002\.parquet, column 'image', row 3: {reason}"
    with pytest.raises(DataError, match=match):
        list(Shard(source, 0, 1, seed=0, cache=cache).batches(0, 10))


def test_a_file_that_vanishes_while_streaming_is_named(source):
    shard = Shard(source, 0, 1, seed=0, cache="stream")
    source.files[0].unlink()
    with pytest.raises(DataError, match=r"train\.parquet, row group \d+: cannot be read"):
        next(shard.batches(0, 20))


def test_a_file_rewritten_while_streaming_is_noticed(source, tmp_path, write_numbered):
    shard = Shard(source, 0, 1, seed=0, cache="stream")
    write_numbered(tmp_path, 300, 15)
    with pytest.raises(DataError, match=r"15 rows, but it had 16 before; a file must not be rewritten"):
        next(shard.in_order(300))
