"""The records of a simulation for Prometheus: what metrics/table.py has under federated.

Counters count what this process has simulated, so their records are sums since its start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrobust.federated.settings import SimulatedMetricsConfig
from distrobust.federated.totals import Totals
from distrobust.metrics.prometheus import Exporter


class Served:
    """A sink over an exporter. `notice`: what the user should know about its port, if anything."""

    def __init__(self, run: Path, settings: SimulatedMetricsConfig) -> None:
        port = 0 if settings.port is None else settings.port
        self._exporter = Exporter(
            run.name, 0, host=settings.host, port=port, file_sd=run / "prometheus", linger_s=settings.linger_s
        )
        self.notice, self.address = self._exporter.notice, self._exporter.address
        self._sums, self._rounds, self._planned = Totals(), 0, 0

    def write(self, record: Mapping[str, Any]) -> None:
        event = record["event"]
        if event == "simulation":
            self._planned = record["config"]["rounds"]["number"]
            self._exporter.write({**record, "event": "run", "resumed_step": record["first_round"]})
            self._show({"finished_rounds": record["first_round"]})
        elif event == "round":
            self._rounds += 1
            self._sums.add(dict(record))
            now = {name: record[name] for name in ("time", "clock_s", "loss", "host_s")}
            self._show({**now, "finished_rounds": record["round"] + 1})
        elif event == "held_out":
            low = record["client_quantiles"][0]
            self._exporter.write({**record, "event": "federated_held_out", "low_client": low})

    def close(self) -> None:
        self._exporter.close()

    def _show(self, now: dict[str, Any]) -> None:
        sums = {**dataclasses.asdict(self._sums), "rounds": self._rounds, "planned_rounds": self._planned}
        self._exporter.write({"event": "federated_round", **sums, **now})
