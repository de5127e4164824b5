"""Which rows are a client's: every row one client's, or, with `rows`, drawn by each client for itself when it is asked.

iid, shards (McMahan et al., AISTATS 2017: rows sorted by label, cut into clients x shards pieces), dirichlet. The
latter in its two usual forms: shared out, class by class, with shares ~ Dir(alpha) over clients (Yurochkin et al.,
ICML 2019); drawn, each client with its own class shares ~ Dir(alpha) over classes (Hsu et al., 2019, with alpha for
each class where they have it for all together). Drawn rows cost nothing until a client is sampled, so there may be
a million clients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from distrobust.errors import ConfigError, DataError
from distrobust.federated import draws
from distrobust.federated.draws import Integers, Purpose
from distrobust.federated.settings import ClientsConfig

CACHED = 1 << 16  # clients whose drawn rows are remembered


class Partition:
    """Clients 0 to num_clients - 1 and the rows of each, as numbers below the number of rows that were shared out."""

    def __init__(self, num_clients: int, rows_of: Callable[[int], Integers]) -> None:
        self.num_clients = num_clients
        self.rows_of = rows_of  #: client -> (its rows,) int64, at least one


def make(
    settings: ClientsConfig, labels: Integers, num_classes: int, seed: int, groups: Integers | None = None
) -> Partition:
    """labels (rows,): of the rows to share out. groups (rows,): numbers of `column`'s values.

    Raises DataError if a client would have no row, ConfigError for more rows a client than there are.
    """
    if settings.partition == "client":
        assert groups is not None
        present, owners = np.unique(groups, return_inverse=True)
        if settings.registered not in (None, len(present)):
            raise ConfigError(
                f"clients.registered is {settings.registered}, but column {settings.column!r} has {len(present)} "
                "values in the training rows; set it to null"
            )
        if settings.per_round > len(present):
            raise ConfigError(
                f"clients.per_round is {settings.per_round}, but column {settings.column!r} has {len(present)} values "
                "in the training rows; wanted at most as many"
            )
        return _shared_out(owners, len(present), settings)
    assert settings.registered is not None
    if settings.rows is not None:
        return Partition(settings.registered, _drawn(settings, settings.rows, labels, num_classes, seed))
    order = np.argsort(draws.uniform(seed, Purpose.PARTITION, np.arange(len(labels))), kind="stable")
    owners = np.empty(len(labels), dtype=np.int64)
    if settings.partition == "iid":
        owners[order] = _even(len(labels), settings.registered)
    elif settings.partition == "shards":
        by_label = order[np.argsort(labels[order], kind="stable")]
        pieces = settings.registered * settings.shards
        dealt = np.argsort(draws.uniform(seed, Purpose.PARTITION, np.arange(pieces), 1), kind="stable")
        owners[by_label] = dealt[_even(len(labels), pieces)] // settings.shards
    else:
        classes = labels if settings.partition == "dirichlet" else groups
        assert classes is not None
        found = [order[classes[order] == value] for value in np.unique(classes)]
        if settings.partition == "dirichlet":
            for number, rows in enumerate(found):
                shares = _dirichlet(draws.generator(seed, Purpose.PARTITION, number), settings)
                ends = (np.cumsum(shares) * len(rows)).round().astype(np.int64)
                owners[rows] = np.searchsorted(ends, np.arange(len(rows)), side="right").clip(max=len(shares) - 1)
        else:
            counts = _clients_of_groups([len(rows) for rows in found], settings)
            first = 0
            for rows, count in zip(found, counts, strict=True):
                owners[rows] = first + _even(len(rows), count)
                first += count
    return _shared_out(owners, settings.registered, settings)


def _even(num_rows: int, num_parts: int) -> Integers:
    """(num_rows,) ascending part numbers, sizes differing by at most one."""
    return np.arange(num_rows, dtype=np.int64) * num_parts // max(1, num_rows)


def _dirichlet(generator: np.random.Generator, settings: ClientsConfig) -> draws.Floats:
    assert settings.registered is not None
    return generator.dirichlet(np.full(settings.registered, settings.alpha))


def _clients_of_groups(sizes: list[int], settings: ClientsConfig) -> list[int]:
    """Clients of each group: one, and the rest by size (largest remainders)."""
    assert settings.registered is not None
    spare = settings.registered - len(sizes)
    if spare < 0:
        raise ConfigError(
            f"clients.registered is {settings.registered}, but column {settings.column!r} has {len(sizes)} values, "
            "each of which needs a client; wanted at least as many"
        )
    exact = np.array(sizes) * spare / sum(sizes)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: spare - counts.sum()]] += 1
    return [int(count) + 1 for count in counts]


def _shared_out(owners: Integers, num_clients: int, settings: ClientsConfig) -> Partition:
    """owners (rows,): the client of each row."""
    counts = np.bincount(owners, minlength=num_clients)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise DataError(
            f"clients.partition {settings.partition} of {len(owners)} rows leaves {len(empty)} of {num_clients} "
            f"clients without one, the first is client {empty[0]}; register fewer clients, raise clients.alpha, or set "
            "clients.rows, so that clients may share rows"
        )
    order = np.argsort(owners, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])
    return Partition(num_clients, lambda client: order[starts[client] : starts[client + 1]])


def _drawn(
    settings: ClientsConfig, num_rows: int, labels: Integers, num_classes: int, seed: int
) -> Callable[[int], Integers]:
    """Each client's own draw, a function of (seed, client)."""
    if num_rows > len(labels):
        raise ConfigError(f"clients.rows is {num_rows}, but there are only {len(labels)} training rows")
    pools = [pool for pool in (np.flatnonzero(labels == label) for label in range(num_classes)) if len(pool)]
    if settings.partition == "shards" and settings.shards > min(len(pools), num_rows):
        raise ConfigError(
            f"clients.shards is {settings.shards}, with clients.rows {num_rows} and {len(pools)} classes; wanted at "
            "most the smaller of the two"
        )

    @functools.lru_cache(maxsize=CACHED)
    def rows_of(client: int) -> Integers:
        generator = draws.generator(seed, Purpose.PARTITION, client)
        if settings.partition == "iid":
            return generator.choice(len(labels), num_rows, replace=False)
        if settings.partition == "dirichlet":
            counts = generator.multinomial(num_rows, generator.dirichlet(np.full(len(pools), settings.alpha)))
        else:
            counts = np.zeros(len(pools), dtype=np.int64)
            counts[generator.choice(len(pools), settings.shards, replace=False)] = num_rows // settings.shards
            counts[np.flatnonzero(counts)[: num_rows % settings.shards]] += 1
        chosen = [
            generator.choice(pool, count, replace=count > len(pool))  # a small class may have to give some rows twice
            for pool, count in zip(pools, counts.tolist(), strict=True)
            if count
        ]
        return np.concatenate(chosen)

    return rows_of
