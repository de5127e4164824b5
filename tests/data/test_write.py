"""write_parquet: what is written is what is read back, or nothing is written."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from distrobust.data import Shard, describe, write_parquet
from distrobust.errors import DataError


def arrays(channels=3, num_rows=5):
    images = np.random.default_rng(0).integers(0, 256, (num_rows, channels, 4, 6), dtype=np.uint8)
    return images, np.arange(num_rows) % 2


@pytest.mark.parametrize("channels", [1, 3])
def test_reading_gives_what_was_written(tmp_path, channels):
    images, labels = arrays(channels)
    write_parquet(tmp_path / "train.parquet", images, labels, ["no", "yes"], row_group_size=2)
    source = describe(tmp_path, "train")
    read, read_labels = next(Shard(source, 0, 1, seed=0).in_order(5))
    np.testing.assert_array_equal(read.numpy(), images)
    np.testing.assert_array_equal(read_labels.numpy(), labels)
    assert source.class_names == ("no", "yes")
    assert [group.num_rows for group in source.row_groups] == [2, 2, 1]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    images, labels = arrays()
    file = tmp_path / "train.parquet"
    write_parquet(file, images, labels, ["no", "yes"])
    before = file.read_bytes()

    def fail(table, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(KeyboardInterrupt):
        write_parquet(file, images[:2], labels[:2], ["no", "yes"])
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_who_has_the_old_file_open_goes_on_reading_it(tmp_path):
    images, labels = arrays()
    file = tmp_path / "train.parquet"
    write_parquet(file, images, labels, ["no", "yes"])
    before = file.read_bytes()
    with file.open("rb") as reader:
        write_parquet(file, images[:2], labels[:2], ["no", "yes"])
        assert reader.read() == before
    assert describe(tmp_path, "train").total_rows == 2


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file/train\.parquet cannot be written \(.*\); choose another directory"):
        write_parquet(tmp_path / "file" / "train.parquet", *arrays(), ["no", "yes"])


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (np.zeros((2, 3, 4, 4)), np.zeros(2, int), r"images are float64 \(2, 3, 4, 4\), wanted uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, int), r"wanted uint8 \(rows, 1 or 3, H, W\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(3, int), r"labels have shape \(3,\), wanted \(2,\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.array([0, 2]), r"labels are 0 \.\. 2, wanted 0 \.\. 1"),
    ],
)
def test_arrays_that_do_not_fit_are_a_programming_error(tmp_path, images, labels, match):
    with pytest.raises(ValueError, match=match):
        write_parquet(tmp_path / "train.parquet", images, labels, ["no", "yes"])
    assert list(tmp_path.iterdir()) == []
