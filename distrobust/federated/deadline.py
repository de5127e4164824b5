"""A deadline that no registered client can ever meet, found before the first round.

A client's round takes at least two latencies, the training of its rows, and both transfers at the best bandwidth it
ever has. With compressed downloads a late client that has received the whole model needs little of it in later rounds;
so there it is enough that the whole model arrives in one round's time, and all the rest in another's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distrobust.errors import ConfigError
from distrobust.federated import batches
from distrobust.federated.draws import Integers
from distrobust.federated.links import Links
from distrobust.federated.settings import SimulateConfig


def check(
    config: SimulateConfig,
    links: Links,
    num_clients: int,
    rows_of: Callable[[int], Integers],
    dense_bytes: int,
    upload_bytes: int,
) -> None:
    """Raises ConfigError if rounds.deadline_s is below what the fastest client needs.

    rows_of(client): those it trains on.
    """
    deadline_s = config.rounds.deadline_s
    if deadline_s is None:
        return
    clients = np.arange(num_clients)
    if config.clients.rows is not None:
        examples = np.full(len(clients), batches.num_examples(config.clients.rows, config.local))
    else:
        examples = np.array([batches.num_examples(len(rows_of(c)), config.local) for c in clients.tolist()])
    down_s, up_s = (
        links.latency_s(clients) + num_bytes / links.best_bytes_per_s(direction, clients)
        for direction, num_bytes in (("download", dense_bytes), ("upload", upload_bytes))
    )
    rest_s = links.compute_s(clients, examples) + up_s
    needed_s = np.maximum(down_s, rest_s + links.latency_s(clients)) if config.download is not None else down_s + rest_s
    fastest = int(np.argmin(needed_s))
    if needed_s[fastest] > deadline_s:
        down, rest = down_s[fastest], rest_s[fastest]
        raise ConfigError(
            f"rounds.deadline_s: got {deadline_s:g}, which none of {len(clients):,} clients can meet; wanted more than "
            f"{needed_s[fastest]:.4g}: the fastest, client {fastest}, needs {down:.3g} s to download and {rest:.3g} s "
            "to train and upload; raise it, make links faster, or compress with upload and download"
        )
