"""Records as named numbers, for places that draw curves: the rows of table.py, without the labels of Prometheus.

A name is `event/metric`, with further parts where one record feeds several curves: the layer group, model, attack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distrobust.metrics.table import TABLE

EVENTS = ("step", "epoch", "watch", "checkpoint", "checkpoint_failed", "diverged", "evaluation")
"""Those with numbers that change over a run; the others are said once."""
_ROWS = {event: [m for m in TABLE if m.event == event and m.field != "time"] for event in EVENTS}


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """{} for a record without numbers of the table; what is missing or not finite is left out."""
    found: dict[str, float] = {}
    for metric in _ROWS.get(str(record.get("event")), ()):
        name = f"{metric.event}/{metric.name.removeprefix('distrobust_')}"
        for label in ("model", "attack"):
            if label in metric.labels and record.get(label):
                name += f"/{record[label]}"
        value = record.get(metric.field)
        for group, number in value.items() if isinstance(value, Mapping) else [("", value)]:
            if number is not None and math.isfinite(float(number)):
                found[f"{name}/{group}" if group else name] = float(number)
    return found
