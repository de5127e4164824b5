"""Where the numbers of a run go: Prometheus, JSON lines, the person in front of the terminal.

The training loop emits plain records (dictionaries with "event" and "time", unix seconds) and knows none of
the sinks. Importing this package imports neither prometheus_client nor rich.

    table.py        the one table of Prometheus metrics and of the record fields that feed them
    prometheus.py   records -> an HTTP endpoint per worker
    jsonl.py        records <-> RUN/metrics.jsonl, the file everything else is made from
    tensorboard.py, weights_and_biases.py       on request; the curves they draw are those of scalars.py
    alerts.py       what deserves to wake somebody, and what to do then
    dashboard.py    the Grafana dashboard
    console.py      records -> a progress bar, or plain lines; the before / after table
"""

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Something that takes records. `write` is cheap; `close` may be called twice."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Fanout:
    """Hands every record to each sink, in order. Closes all of them, even if one fails to close."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def write(self, record: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    def close(self) -> None:
        errors: list[Exception] = []
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:  # the first one is raised below, after the others had their turn
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> "Fanout":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OptionalSink:
    """A sink of another library's, which no run ends for: at its first failure it is given up, and that is logged."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self._sink: Sink | None = sink

    def write(self, record: Mapping[str, Any]) -> None:
        if self._sink is not None:
            try:
                self._sink.write(record)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        if self._sink is not None:
            try:
                self._sink.close()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._sink = None
        _log.warning("%s: given up for the rest of this start: %s", self.name, " ".join(str(error).split())[:200])
