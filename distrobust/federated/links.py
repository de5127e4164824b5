"""Bandwidth, latency and compute speed of every client, as functions of (seed, client); traces of bandwidth from CSV.

A transfer of b bytes takes latency + 8 b / bandwidth. Bandwidths, latencies and speeds are log-normal over clients:
median x exp(spread x normal).
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distrobust.errors import DataError
from distrobust.federated import draws
from distrobust.federated.draws import Floats, Integers, Purpose
from distrobust.federated.settings import LinksConfig

COLUMNS = ("trace", "start_s", "stop_s", "download_mbit", "upload_mbit")
DIRECTIONS = {"download": Purpose.DOWNLOAD, "upload": Purpose.UPLOAD}
GAP_S = 1e-6  # between the end of a row and the start of the next


@dataclass(frozen=True)
class Trace:
    """times (m + 1,) s from 0; sent[direction] (m + 1,): bytes that could have been sent by then. Then again from 0."""

    times: Floats
    sent: dict[str, Floats]

    def at(self, direction: str, time: float) -> float:
        """Bytes that could have been sent from 0 to `time`."""
        sent, length = self.sent[direction], self.times[-1]
        rounds, rest = divmod(time, length)
        return float(rounds * sent[-1] + np.interp(rest, self.times, sent))

    def when(self, direction: str, num_bytes: float) -> float:
        """The inverse of `at`: the first time by which so many could have been sent."""
        sent = self.sent[direction]
        rounds, rest = divmod(num_bytes, sent[-1])
        place = max(1, int(np.searchsorted(sent, rest)))
        low, high = sent[place - 1], sent[place]
        share = (rest - low) / (high - low) if high > low else 0.0
        return float(
            rounds * self.times[-1] + self.times[place - 1] + share * (self.times[place] - self.times[place - 1])
        )


class Links:
    """Clients' links and devices. Times are seconds on the virtual clock, arrays (C,) one entry a client."""

    def __init__(self, settings: LinksConfig, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self._traces = read_traces(settings.traces) if settings.traces is not None else []

    def latency_s(self, clients: Integers) -> Floats:
        return self._drawn(Purpose.LATENCY, clients, self._settings.latency_s, self._settings.latency_spread)

    def compute_s(self, clients: Integers, num_examples: Integers) -> Floats:
        """To train on so many rows."""
        settings = self._settings
        speed = self._drawn(Purpose.COMPUTE, clients, settings.examples_per_s, settings.compute_spread)
        return np.asarray(num_examples / speed, dtype=np.float64)

    def finished(self, direction: str, clients: Integers, start: Floats, num_bytes: Floats) -> Floats:
        """When transfers that begin at `start` are over."""
        start = start + self.latency_s(clients)
        if not self._traces:
            return start + num_bytes / self._bytes_per_s(direction, clients)
        rows = zip(self._traces_of(clients), start.tolist(), num_bytes.tolist(), strict=True)
        finished: Floats = np.array([max(t, trace.when(direction, trace.at(direction, t) + b)) for trace, t, b in rows])
        return finished

    def sent_by(self, direction: str, clients: Integers, start: Floats, num_bytes: Floats, until: Floats) -> Floats:
        """Bytes of such transfers that have left at the time `until`, rounded down."""
        start = start + self.latency_s(clients)
        seconds = np.maximum(until - start, 0.0)
        if not self._traces:
            return np.floor(np.minimum(num_bytes, seconds * self._bytes_per_s(direction, clients)))
        rows = zip(self._traces_of(clients), start.tolist(), (start + seconds).tolist(), strict=True)
        possible = np.array([trace.at(direction, stop) - trace.at(direction, begin) for trace, begin, stop in rows])
        left: Floats = np.floor(np.minimum(num_bytes, possible))
        return left

    def best_bytes_per_s(self, direction: str, clients: Integers) -> Floats:
        """The most that a client's link ever has."""
        if not self._traces:
            return self._bytes_per_s(direction, clients)
        best = [float((np.diff(trace.sent[direction]) / np.diff(trace.times)).max()) for trace in self._traces]
        return np.array(best)[clients % len(best)]

    def _bytes_per_s(self, direction: str, clients: Integers) -> Floats:
        settings = self._settings
        median = settings.download_mbit if direction == "download" else settings.upload_mbit
        return self._drawn(DIRECTIONS[direction], clients, median, settings.bandwidth_spread) * (1e6 / 8)

    def _drawn(self, purpose: Purpose, clients: Integers, median: float, spread: float) -> Floats:
        values: Floats = median * np.exp(spread * draws.normal(self._seed, purpose, clients))
        return values

    def _traces_of(self, clients: Integers) -> list[Trace]:
        return [self._traces[client % len(self._traces)] for client in clients.tolist()]


def read_traces(path: Path) -> list[Trace]:
    """In the order of first appearance. DataError, naming the line, for gaps, negative bandwidths and the like."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or sorted(reader.fieldnames) != sorted(COLUMNS):
                raise DataError(f"{path}, line 1: got columns {reader.fieldnames}, wanted {','.join(COLUMNS)}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                try:
                    start, stop, down, up = (float(row[name]) for name in COLUMNS[1:])
                except (TypeError, ValueError):
                    raise DataError(f"{where}: got {row}, wanted numbers in {', '.join(COLUMNS[1:])}") from None
                rows = found.setdefault(row["trace"], [])
                _check(where, row["trace"], rows[-1][1] if rows else 0.0, start, stop, (down, up))
                rows.append((start, stop, down, up))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); see links.traces") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not CSV ({error})") from None
    if not found:
        raise DataError(f"{path}: no rows, wanted at least one trace")
    traces = []
    for name, rows in found.items():
        table = np.array(rows)
        seconds = table[:, 1] - table[:, 0]
        sent = {
            direction: np.concatenate([[0.0], np.cumsum(seconds * table[:, column] * (1e6 / 8))])
            for column, direction in ((2, "download"), (3, "upload"))
        }
        for direction, total in sent.items():
            if total[-1] == 0.0:
                raise DataError(f"{path}: trace {name!r} never has any {direction} bandwidth, so nothing would arrive")
        traces.append(Trace(np.concatenate([[0.0], table[:, 1]]), sent))
    return traces


def _check(where: str, trace: str, expected: float, start: float, stop: float, rates: tuple[float, float]) -> None:
    if not all(math.isfinite(value) for value in (start, stop, *rates)):
        raise DataError(f"{where}: trace {trace!r} has a value that is not finite")
    if any(rate < 0 for rate in rates):
        raise DataError(
            f"{where}: trace {trace!r} has a bandwidth of {min(rates):g} Mbit/s; wanted 0 (an outage) or more"
        )
    if abs(start - expected) > GAP_S:
        kind = "a gap" if start > expected else "an overlap"
        raise DataError(
            f"{where}: trace {trace!r} has {kind}: start_s is {start:g}, the rows before end at {expected:g} s; "
            "give an outage as a row with bandwidth 0"
        )
    if stop <= start:
        raise DataError(f"{where}: trace {trace!r}: stop_s {stop:g} is not after start_s {start:g}")
