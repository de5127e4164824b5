"""Which rows are whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distrobust import data
from distrobust.errors import ConfigError, DataError
from distrobust.federated import partition
from distrobust.federated.partition import Partition
from distrobust.federated.settings import ClientsConfig

LABELS = np.random.default_rng(0).integers(0, 10, 2000)
GROUPS = np.random.default_rng(1).choice(5, 2000, p=[0.5, 0.2, 0.1, 0.1, 0.1])


def made(**settings: Any) -> Partition:
    return partition.make(ClientsConfig(**settings), LABELS, 10, 3, GROUPS)


SHARED_OUT: list[dict[str, Any]] = [
    {"registered": 50},
    {"registered": 20, "partition": "dirichlet", "alpha": 1.0},
    {"registered": 50, "partition": "shards"},
    {"registered": 20, "partition": "group", "column": "site"},
    {"registered": None, "per_round": 2, "partition": "client", "column": "site"},
]


@pytest.mark.parametrize("settings", SHARED_OUT, ids=str)
def test_every_row_is_exactly_one_clients(settings: dict[str, Any]) -> None:
    found = made(**settings)
    rows = [found.rows_of(client) for client in range(found.num_clients)]
    assert all(len(own) for own in rows)
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(2000))
    again = made(**settings)
    assert all(np.array_equal(again.rows_of(client), own) for client, own in enumerate(rows))


def test_iid_parts_are_of_one_size() -> None:
    found = made(registered=30)
    assert {len(found.rows_of(client)) for client in range(30)} == {66, 67}


def test_shards_hold_few_classes() -> None:
    found = made(registered=50, partition="shards", shards=2)
    assert (
        max(len(set(LABELS[found.rows_of(client)].tolist())) for client in range(50)) <= 4
    )  # 2 pieces, each over a border
    assert np.mean([len(set(LABELS[found.rows_of(client)].tolist())) for client in range(50)]) < 2.5


def test_clients_of_a_group_have_its_rows_only() -> None:
    found = made(registered=20, partition="group", column="site")
    groups = [set(GROUPS[found.rows_of(client)].tolist()) for client in range(20)]
    assert all(len(group) == 1 for group in groups)
    counts = np.bincount([group.pop() for group in groups])
    assert counts.sum() == 20
    assert counts[0] == counts.max()


def test_a_client_column_says_whose_rows_are_whose() -> None:
    found = made(registered=None, per_round=2, partition="client", column="site")
    assert found.num_clients == 5
    assert all(set(GROUPS[found.rows_of(client)].tolist()) == {client} for client in range(5))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards"])
def test_drawn_rows_follow_from_seed_and_client_however_many_are_registered(kind: str) -> None:
    few, many = (made(registered=count, partition=kind, rows=40) for count in (100, 1_000_000))
    for client in (0, 7, 99):
        assert np.array_equal(few.rows_of(client), many.rows_of(client))
    assert len(many.rows_of(999_999)) == 40
    assert not np.array_equal(many.rows_of(0), many.rows_of(999_999))


@pytest.mark.parametrize("rows", [None, 100])
def test_alpha_makes_clients_alike_or_different(rows: int | None) -> None:
    def largest_share(alpha: float) -> float:
        found = made(registered=10, partition="dirichlet", alpha=alpha, rows=rows)
        counts = [np.bincount(LABELS[found.rows_of(client)], minlength=10) for client in range(10)]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_share(1000.0) < 0.2
    assert largest_share(0.2) > 0.35


def test_a_client_without_rows_is_named() -> None:
    with pytest.raises(
        DataError, match=r"dirichlet of 2000 rows leaves \d+ of 900 clients without one, .* client \d+;"
    ):
        made(registered=900, partition="dirichlet", alpha=0.05)
    with pytest.raises(DataError, match="leaves 1000 of 3000 clients without one"):
        made(registered=3000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 2001}, "clients.rows is 2001, but there are only 2000 training rows"),
        ({"rows": 10, "partition": "shards", "shards": 11}, "clients.shards is 11"),
        (
            {"registered": 3, "per_round": 1, "partition": "group", "column": "site"},
            "has 5 values, each of which needs",
        ),
        ({"registered": 7, "per_round": 1, "partition": "client", "column": "site"}, "is 7, but column 'site' has 5"),
        ({"registered": None, "partition": "client", "column": "site"}, "per_round is 10, but column 'site' has 5"),
    ],
)
def test_impossible_partitions_are_one_clear_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        made(**settings)
    assert "\n" not in str(caught.value)


def test_groups_are_read_from_any_column_of_the_files(tmp_path: Path) -> None:
    data.write_parquet(tmp_path / "train.parquet", np.zeros((6, 1, 8, 8), np.uint8), np.arange(6) % 2, ["a", "b"])
    table = pq.read_table(tmp_path / "train.parquet")
    sites = pa.array(["x", "y", "x", "z", "z", "x"])
    pq.write_table(
        table.append_column("site", sites).append_column("hole", pa.array([1, None, 2, 2, 2, 2])),
        tmp_path / "train.parquet",
    )
    source = data.describe(tmp_path, "train")
    names, numbers = data.read_groups(source, "site")
    assert (names, numbers.tolist()) == (("x", "y", "z"), [0, 1, 0, 2, 2, 0])
    with pytest.raises(DataError, match="no column 'sight'"):
        data.read_groups(source, "sight")
    with pytest.raises(DataError, match="column 'hole', row 1: null"):
        data.read_groups(source, "hole")
