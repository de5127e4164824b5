"""One round on the virtual clock: download, compute, upload; who arrives in time, and what the others cost.

Lengths of messages and numbers of local steps are known beforehand, so the clock runs before anything is trained, and
only clients whose update will count are trained at all: the others leave no trace but their bytes and their time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distrobust.federated import draws
from distrobust.federated.draws import Floats, Integers, Purpose
from distrobust.federated.links import Links

ARRIVED, LATE, SURPLUS, LOST = range(4)  # after the deadline; after per_round others; in the middle of the upload


@dataclass(frozen=True)
class Course:
    """What became of each client of a round: arrays (C,), times in seconds after its beginning.

    Bytes are what crossed the link until the round ended or the client was lost. has_model: its download was complete.
    """

    fate: Integers
    has_model: np.ndarray[tuple[int], np.dtype[np.bool_]]
    download_bytes: Integers
    upload_bytes: Integers
    download_s: Floats
    compute_s: Floats
    upload_s: Floats
    wait_s: Floats
    duration_s: float
    fastest_s: float  # when the first client would have arrived without a deadline; inf if none would


def run(
    links: Links,
    clients: Integers,
    clock_s: float,
    download_bytes: Integers,
    upload_bytes: int,
    num_examples: Integers,
    *,
    wanted: int,
    deadline_s: float | None,
    drop_out: float,
    seed: int,
    round_number: int,
) -> Course:
    """clients ascending; the round ends when `wanted` have arrived, at the deadline, or when nobody is left."""
    begin = np.full(len(clients), clock_s)
    down, up = download_bytes.astype(np.float64), np.full(len(clients), float(upload_bytes))
    downloaded = links.finished("download", clients, begin, down)
    computed = downloaded + links.compute_s(clients, num_examples)
    uploaded = links.finished("upload", clients, computed, up)
    lost = draws.uniform(seed, Purpose.DROP_OUT, round_number, clients) < drop_out
    share = draws.uniform(seed, Purpose.DROP_POINT, round_number, clients)
    ends = np.where(lost, links.finished("upload", clients, computed, np.floor(up * share)), uploaded)
    in_time = ~lost & (ends - clock_s <= (np.inf if deadline_s is None else deadline_s))
    order = np.lexsort((clients, ends))
    arrived = order[in_time[order]][:wanted]
    fate = np.where(lost, LOST, np.where(in_time, SURPLUS, LATE))
    fate[arrived] = ARRIVED
    if len(arrived) == wanted:
        over = float(ends[arrived].max())
    else:
        over = min(float(ends.max(initial=clock_s)), clock_s + (np.inf if deadline_s is None else deadline_s))
    stops = np.minimum(ends, over)
    has_model = downloaded <= stops
    partial_down = links.sent_by("download", clients, begin, down, stops).astype(np.int64)
    partial_up = links.sent_by("upload", clients, computed, up, stops).astype(np.int64)
    return Course(
        fate,
        has_model,
        np.where(has_model, download_bytes, partial_down),
        np.where(fate == ARRIVED, upload_bytes, partial_up),
        np.minimum(downloaded, stops) - clock_s,
        np.minimum(computed, stops) - np.minimum(downloaded, stops),
        stops - np.minimum(computed, stops),
        over - stops,
        over - clock_s,
        float((uploaded - clock_s)[~lost].min(initial=np.inf)),
    )
