"""What rounds add up to: clients by fate, bytes by direction, wasted ones, and clients' time; and a round's record."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from distrobust.federated.draws import Integers
from distrobust.federated.server import WeightedMean
from distrobust.federated.timeline import ARRIVED, LATE, LOST, SURPLUS, Course

BANDS = 20  # of client numbers, in the record of who took part
SUMMED = (
    *("updates", "late", "surplus", "lost", "nonfinite"),
    *("download_bytes", "upload_bytes", "wasted_download_bytes", "wasted_upload_bytes"),
    *("download_s", "compute_s", "upload_s", "wait_s"),
)


@dataclass
class Totals:
    """Sums over rounds. Bytes are messages' real lengths; `wasted`: of clients whose update did not count."""

    updates: int = 0
    late: int = 0
    surplus: int = 0
    lost: int = 0
    nonfinite: int = 0
    short_rounds: int = 0  # with fewer clients to be reached than were wanted
    download_bytes: int = 0
    upload_bytes: int = 0
    wasted_download_bytes: int = 0
    wasted_upload_bytes: int = 0
    download_s: float = 0.0  # of all clients together, as the next three
    compute_s: float = 0.0
    upload_s: float = 0.0
    wait_s: float = 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Takes up the record of a round."""
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + record[name])


@dataclass
class Round:
    """What one round adds up."""

    mean: WeightedMean
    control: Tensor  # sum of the changes of c_i
    losses: list[float] = field(default_factory=list)
    nonfinite: list[int] = field(default_factory=list)  # places in the round's clients


def record(
    number: int, clock_s: float, clients: Integers, num_clients: int, course: Course, this: Round, seconds: float
) -> dict[str, Any]:
    """Of a round that ended at clock_s; `seconds` it took here. `took_part`: see `by_band`."""
    counted = course.fate == ARRIVED
    counted[this.nonfinite] = False
    return {
        "event": "round",
        "time": time.time(),
        "round": number,
        "clock_s": clock_s,
        "started": len(clients),
        "updates": len(this.losses),
        **{name: int((course.fate == f).sum()) for f, name in ((LATE, "late"), (SURPLUS, "surplus"), (LOST, "lost"))},
        "nonfinite": len(this.nonfinite),
        "loss": float(np.mean(this.losses)) if this.losses else None,
        **{name: int(getattr(course, name).sum()) for name in ("download_bytes", "upload_bytes")},
        **{f"wasted_{d}_bytes": int(getattr(course, f"{d}_bytes")[~counted].sum()) for d in ("download", "upload")},
        **{name: float(getattr(course, name).sum()) for name in ("download_s", "compute_s", "upload_s", "wait_s")},
        "took_part": by_band(clients[counted], num_clients),
        "host_s": seconds,
    }


def by_band(clients: Integers, num_clients: int) -> list[int]:
    """How many of them are in each of up to BANDS equal bands of client numbers."""
    bands = min(BANDS, num_clients)
    counts: list[int] = np.bincount(clients * bands // num_clients, minlength=bands).tolist()
    return counts
