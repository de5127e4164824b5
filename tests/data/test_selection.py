"""The held-out part of a split."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from distrobust.data import Shard, describe, split_held_out
from distrobust.errors import ConfigError


@pytest.fixture
def source(tmp_path, write_numbered):
    return describe(write_numbered(tmp_path, 50, 8), "train")


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.98])
def test_the_two_parts_partition_the_rows(source, fraction):
    train, held_out = split_held_out(source, fraction, seed=3)
    assert held_out.num_rows == round(50 * fraction) == len(held_out.rows())
    assert train.num_rows == len(train.rows())
    assert sorted([*train.rows(), *held_out.rows()]) == list(range(50))
    assert np.all(np.diff(train.rows()) > 0)


def test_parts_depend_on_the_seed_alone_and_survive_pickling(source):
    parts = split_held_out(source, 0.2, seed=3)
    assert parts == split_held_out(source, 0.2, seed=3) == pickle.loads(pickle.dumps(parts))
    assert parts[1].rows().tolist() != split_held_out(source, 0.2, seed=4)[1].rows().tolist()


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_shards_of_a_part_hold_its_rows_for_any_world_size(source, world_size):
    for part in split_held_out(source, 0.2, seed=3):
        shards = [Shard(source, rank, world_size, seed=0, rows=part) for rank in range(world_size)]
        assert sorted(row for shard in shards for row in shard.rows) == part.rows().tolist()
        assert all(shard.total_rows == part.num_rows for shard in shards)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_the_open_interval_is_refused(source, fraction):
    with pytest.raises(ConfigError, match=f"held-out fraction is {fraction}, wanted more than 0 and less than 1"):
        split_held_out(source, fraction, seed=0)


@pytest.mark.parametrize(("fraction", "rows"), [(0.001, 0), (0.999, 50)])
def test_a_fraction_that_empties_one_part_is_refused(source, fraction, rows):
    with pytest.raises(ConfigError, match=f"fraction {fraction} of 50 rows is {rows} rows, wanted at least one"):
        split_held_out(source, fraction, seed=0)


def test_a_selection_of_another_data_set_is_refused(source, tmp_path, write_numbered):
    other = describe(write_numbered(tmp_path / "other", 49, 8), "train")
    with pytest.raises(ValueError, match="selection is of 49 rows, the source has 50"):
        Shard(source, 0, 1, seed=0, rows=split_held_out(other, 0.2, seed=0)[0])
