"""Records as Prometheus metrics, served by every worker over HTTP.

What each record field becomes is in table.py. Counters count what this process has done: a cumulative field
that goes down (training went back to a checkpoint) adds nothing, and a resumed run starts counting at its
first step record. So a counter may miss one logging interval at a restart, and never reports work twice.

A step record costs about 20 us (tests/metrics/test_prometheus.py holds a bound): labelled children are looked
up once per phase, afterwards a write is one update per fed metric.
"""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrobust.errors import ConfigError
from distrobust.metrics.table import BUILD, TABLE, WHO, Metric

if TYPE_CHECKING:
    import threading
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import CollectorRegistry, Counter, Gauge

Feed = Callable[[Any], None]

_LABEL_FIELDS = ("phase", "attack", "model")  # record fields that are labels; `group` is a key, see table.py
_STEP_COUNTERS = tuple(metric for metric in TABLE if metric.kind == "counter" and metric.event == "step")
_PHASE_COUNTERS = tuple(metric for metric in TABLE if metric.kind == "counter" and "phase" in metric.labels)


class Exporter:
    """One worker's metrics endpoint: a registry of its own and an HTTP server in a daemon thread.

    run, rank: the labels on every metric (name of the run directory, global rank).
    host: address to listen on; "0.0.0.0" for other machines to reach it.
    port: base port. The server takes port + local_rank (default: rank), and any free port when that one is
        taken: then `notice` says so. 0 asks for any free port.
    file_sd: directory for the file `rank-N.json` of Prometheus' file-based discovery, with the real address.
        Removed by `close`.
    linger_s: seconds `close` waits, so that the last values are scraped before the endpoint goes.
    is_asked: whether somebody wants the run to end; `close` waits no longer once somebody newly does.
    """

    def __init__(
        self,
        run: str,
        rank: int,
        *,
        host: str = "127.0.0.1",
        port: int = 9400,
        local_rank: int | None = None,
        file_sd: Path | None = None,
        linger_s: float = 0.0,
        is_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        from prometheus_client import CollectorRegistry

        self.registry = CollectorRegistry()
        self.notice: str | None = None
        self._who = (run, str(rank))
        self._linger_s, self._is_asked = linger_s, is_asked
        self._families = {metric.name: _family(metric, self.registry) for metric in TABLE}
        self._plans: dict[tuple[str, ...], list[tuple[str, Feed]]] = {}
        self._counters: dict[tuple[str, ...], _Difference] = {}
        self._resumed = False

        wanted = port + (rank if local_rank is None else local_rank) if port else 0
        self._server, self._thread = self._serve(host, wanted)
        self.port: int = self._server.server_port
        self.address = f"{_reachable(host)}:{self.port}"
        self._discovery = _announce(file_sd, self.address, run, rank) if file_sd is not None else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Updates every metric that `record` feeds. Unknown events and missing or null fields are ignored."""
        event = str(record["event"])
        if event == "run":
            record = self._started(record)
        elif event == "phase":
            self._show_zeros(record)
        elif event == "step" and self._resumed:
            self._skip_earlier_work(record)
        key = (event, *(str(record.get(field, "")) for field in _LABEL_FIELDS))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(event, record)
        for field, feed in plan:
            value = record.get(field)
            if value is not None:
                feed(value)

    def close(self) -> None:
        """Stops the server and its thread and removes the discovery file. A second call does nothing."""
        if not self._thread.is_alive():
            return
        until, was_asked = time.monotonic() + self._linger_s, self._is_asked()
        while (left := until - time.monotonic()) > 0 and (was_asked or not self._is_asked()):
            time.sleep(min(left, 0.2))
        if self._discovery is not None:
            self._discovery.unlink(missing_ok=True)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, host: str, port: int) -> "tuple[WSGIServer, threading.Thread]":
        from prometheus_client import start_http_server

        try:
            return start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as error:  # taken, privileged, or above 65535
            reason = getattr(error, "strerror", None) or str(error)
        try:
            server, thread = start_http_server(0, host, self.registry)
        except OSError as error:
            raise ConfigError(
                f"metrics: cannot listen on host {host!r}: {error.strerror}; use an address of this machine, "
                "such as 127.0.0.1 or 0.0.0.0"
            ) from error
        self.notice = f"metrics port {port} is not available ({reason}); serving on {server.server_port} instead"
        return server, thread

    def _started(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A run record with the number of restarts, after publishing the versions as labels."""
        versions = record.get("versions") or {}
        text = {"version": "distrobust", "torch": "torch", "python": "python"}
        labels = [str(versions.get(text[label], "")) for label in BUILD[len(WHO) :]]
        self._families["distrobust_build_info"].labels(*self._who, *labels).set(1)
        self._resumed = bool(record.get("resumed_step"))
        return {"restarts": int(self._resumed), **record}

    def _show_zeros(self, record: Mapping[str, Any]) -> None:
        """Exposes a phase's counters before they grow: increase() misses a series' first value."""
        for metric in _PHASE_COUNTERS:
            self._counter(metric, record)

    def _skip_earlier_work(self, record: Mapping[str, Any]) -> None:
        """Makes the first step record after a resume the point from which counters count."""
        self._resumed = False
        for metric in _STEP_COUNTERS:
            value = record.get(metric.field)
            if value is not None:
                self._counter(metric, record).last = float(value)

    def _plan(self, event: str, record: Mapping[str, Any]) -> list[tuple[str, Feed]]:
        """(record field, what to do with its value) for each metric fed by records like this one."""
        plan: list[tuple[str, Feed]] = []
        for metric in TABLE:
            if metric.event != event or metric.labels is BUILD:
                continue
            if "group" in metric.labels:
                plan.append((metric.field, _ByGroup(self._families[metric.name], self._labels(metric, record))))
            elif metric.kind == "counter":
                plan.append((metric.field, self._counter(metric, record)))
            else:
                child = self._families[metric.name].labels(*self._labels(metric, record))
                plan.append((metric.field, child.set if metric.kind == "gauge" else _finite(child.observe)))
        return plan

    def _counter(self, metric: Metric, record: Mapping[str, Any]) -> "_Difference":
        labels = self._labels(metric, record)
        key = (metric.name, *labels)
        if key not in self._counters:
            self._counters[key] = _Difference(self._families[metric.name].labels(*labels))
        return self._counters[key]

    def _labels(self, metric: Metric, record: Mapping[str, Any]) -> list[str]:
        own = [label for label in metric.labels[len(WHO) :] if label != "group"]
        return [*self._who, *(str(record.get(label, "")) for label in own)]


class _Difference:
    """Feeds a counter with a cumulative value: adds what it grew by; a smaller value is a new start."""

    def __init__(self, counter: "Counter") -> None:
        self.counter = counter
        self.last = 0.0

    def __call__(self, value: Any) -> None:
        value = float(value)
        if math.isfinite(value):
            if value > self.last:
                self.counter.inc(value - self.last)
            self.last = value


class _ByGroup:
    """Feeds the gauges of a dictionary {group: value}."""

    def __init__(self, gauge: "Gauge", labels: list[str]) -> None:
        self.gauge = gauge
        self.labels = labels
        self.children: dict[str, Gauge] = {}

    def __call__(self, values: Mapping[str, float]) -> None:
        for group, value in values.items():
            child = self.children.get(group)
            if child is None:
                child = self.children[group] = self.gauge.labels(*self.labels, group)
            child.set(value)


def _finite(observe: Callable[[float], None]) -> Feed:
    """A histogram's sum would stay NaN for ever after one NaN."""

    def feed(value: float) -> None:
        if math.isfinite(value):
            observe(value)

    return feed


def _family(metric: Metric, registry: "CollectorRegistry") -> "Any":
    import prometheus_client

    if metric.kind == "histogram":
        return prometheus_client.Histogram(
            metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets
        )
    kind: type[Counter] | type[Gauge] = (
        prometheus_client.Counter if metric.kind == "counter" else prometheus_client.Gauge
    )
    return kind(metric.name, metric.help, metric.labels, registry=registry)


def _reachable(host: str) -> str:
    """The address others should use for a server that listens on `host`."""
    if host not in ("", "0.0.0.0", "::"):
        return f"[{host}]" if ":" in host else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; picks the interface of the default route
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _announce(directory: Path, address: str, run: str, rank: int) -> Path:
    """Writes the discovery file of one rank, whole or not at all.

    Run and rank are on the metrics themselves; as plain target labels they would make Prometheus rename
    those to exported_run and exported_rank, so here they are for relabelling only.
    """
    labels = {"node": socket.gethostname(), "__meta_distrobust_run": run, "__meta_distrobust_rank": str(rank)}
    path = directory / f"rank-{rank}.json"
    directory.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([{"targets": [address], "labels": labels}], indent=2) + "\n")
    os.replace(temporary, path)
    return path
