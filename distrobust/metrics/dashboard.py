"""The Grafana dashboard, from the table of metrics: one line here is one panel.

Rows go from what a run is for to why it may be slow or ill. A panel's help is that of its first metric in
table.py unless it has its own; it cannot speak of a metric that is not there: building it would fail.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from distrobust.metrics.table import TABLE

_HELP = {metric.name: metric.help for metric in TABLE}
_WHERE = '{run=~"$run"}'
_HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True)
class Panel:
    """`queries`: (legend, expression); METRIC stands in an expression as `distrobust_name`, selected by run.

    `unit` is Grafana's: s, bytes, Bps, bps (bits), percentunit, or short for plain numbers.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    help: str | None = None


def _mean(metric: str) -> str:
    """Of a histogram, over ranks and five minutes, per run and phase."""
    return f"sum by (run, phase) (rate({metric}_sum[5m])) / sum by (run, phase) (rate({metric}_count[5m]))"


def _high(metric: str) -> str:
    """The 95th percentile of a histogram, over ranks and five minutes."""
    return f"histogram_quantile(0.95, sum by (run, phase, le) (rate({metric}_bucket[5m])))"


_STEP, _ATTACK = "distrobust_step_seconds", "distrobust_attack_seconds"
_HOOK, _DECODE = "distrobust_comm_hook_seconds", "distrobust_comm_decode_seconds"
_SENT, _DENSE = "distrobust_comm_sent_bytes_total", "distrobust_comm_dense_bytes_total"
_BY_PHASE = "{{run}} {{phase}}"
_BY_RUN, _FED = "{{run}}", "distrobust_federated"


def _rate(metric: str) -> str:
    """Of a counter, added up over ranks, over five minutes."""
    return f"sum by (run, phase) (rate({metric}[5m]))"


# of bytes: what a step would send at another density is taken to be proportional to it
_EVEN_DENSITY = f"max by (run, phase) (distrobust_comm_density_ratio) * {_rate(_DENSE)} / ({_rate(_SENT)} > 0)"
# of time: bits saved in a step of one worker over the seconds it takes to save them
_EVEN_LINK = (
    f"8 * clamp_min({_rate(_DENSE)} - {_rate(_SENT)}, 0)"
    f" / ({_rate('distrobust_steps_total')} * ({_mean(_HOOK)} + {_mean(_DECODE)}))"
)

ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    ("Progress", (
        Panel("Steps finished", "percentunit", ((_BY_PHASE,
              "max by (run, phase) (distrobust_finished_steps) / max by (run, phase) (distrobust_planned_steps)"),)),
        Panel("Loss", "short", ((_BY_PHASE, "max by (run, phase) (distrobust_train_loss)"),)),
        Panel("Held-out accuracy", "percentunit", (
              ("{{run}} {{phase}} clean", "max by (run, phase) (distrobust_clean_accuracy_ratio)"),
              ("{{run}} {{phase}} {{attack}}", "max by (run, phase, attack) (distrobust_robust_accuracy_ratio)"))),
        Panel("Accuracy on training inputs", "percentunit", (
              (_BY_PHASE, "max by (run, phase) (distrobust_train_accuracy_ratio)"),)),
        Panel("Learning rate and attack radius", "short", (
              ("{{run}} {{phase}} rate", "max by (run, phase) (distrobust_learning_rate)"),
              ("{{run}} {{phase}} eps", "max by (run, phase) (distrobust_attack_eps_ratio)"))),
        Panel("Final evaluation", "percentunit", (
              ("{{run}} {{model}} {{attack}}", "max by (run, model, attack) (distrobust_evaluation_accuracy_ratio)"),),
              "stat"),
    )),
    ("Speed", (
        Panel("Step", "s", (("{{run}} {{phase}} mean", _mean(_STEP)), ("{{run}} {{phase}} p95", _high(_STEP)))),
        Panel("Attack, hook and decoding, of a step", "s", (
              ("{{run}} {{phase}} attack", _mean(_ATTACK)), ("{{run}} {{phase}} hook", _mean(_HOOK)),
              ("{{run}} {{phase}} decoding", _mean(_DECODE)))),
        Panel("Examples a second", "short", (
              (_BY_PHASE, "max by (run, phase) (rate(distrobust_samples_total[5m]))"),)),
    )),
    ("Network", (
        Panel("Sent, all workers", "Bps", (
              ("{{run}} {{phase}} sent", _rate(_SENT)),
              ("{{run}} {{phase}} dense", _rate(_DENSE)))),
        Panel("Times fewer bytes than dense, so far", "short", (
              (_BY_PHASE, f"sum by (run, phase) ({_DENSE}) / (sum by (run, phase) ({_SENT}) > 0)"),)),
        Panel("Density, and at which dense sends less", "percentunit", (
              (_BY_PHASE, "max by (run, phase) (distrobust_comm_density_ratio)"),
              ("{{run}} {{phase}} dense sends less", f"clamp_max({_EVEN_DENSITY}, 1)")),
              help="Fraction of gradient coordinates sent; at the other one a step would send as much as dense."),
        Panel("Crossover: compression saves time on links slower than", "bps", ((_BY_PHASE, _EVEN_LINK),),
              help="Bits a worker saves in a step over the seconds it spends on coding and decoding, those that "
              "overlap with the backward pass too. On a faster link dense is faster; 0 in a dense phase."),
    )),
    ("Health", (
        Panel("Time since the last step", "s", (
              ("{{run}}", "time() - max by (run) (distrobust_last_step_timestamp_seconds)"),), "stat", 6),
        Panel("Time since the last checkpoint", "s", (
              ("{{run}}", "time() - max by (run) (distrobust_last_checkpoint_timestamp_seconds)"),), "stat", 6),
        Panel("Restarts", "short", (("{{run}}", "max by (run) (distrobust_worker_restarts_total)"),), "stat", 6),
        Panel("Replicas diverged", "short", (
              ("{{run}}", "max by (run) (distrobust_diverged_replicas) or 0 * max by (run) (distrobust_workers)"),),
              "stat", 6),
        Panel("Residual over gradient", "short", (
              ("{{run}} {{phase}} rank {{rank}}", "distrobust_comm_residual_norm_ratio"),)),
        Panel("Non-finite steps and failed checkpoints", "short", (
              ("{{run}} {{phase}} steps", "max by (run, phase) (distrobust_nonfinite_steps_total)"),
              ("{{run}} {{phase}} checkpoints", "max by (run, phase) (distrobust_checkpoint_failures_total)"))),
        Panel("Catastrophic overfitting: FGSM less PGD-10", "percentunit", (
              (_BY_PHASE, "max by (run, phase) (distrobust_attack_gap_ratio)"),)),
    )),
    ("Layers", (
        Panel("Learning rate over the scheduled one, by group", "short", (
              ("{{run}} {{group}}", "max by (run, phase, group) (distrobust_layer_lr_ratio)"),), width=12),
        Panel("Gradient noise, by group", "short", (
              ("{{run}} {{group}}", "max by (run, phase, group) (distrobust_layer_gradient_noise)"),), width=12),
    )),
    ("Federated simulation", (
        Panel("Rounds finished", "percentunit", ((_BY_RUN,
              f"max by (run) ({_FED}_finished_rounds) / max by (run) ({_FED}_planned_rounds)"),)),
        Panel("Rounds and updates a second", "short", (
              ("{{run}} rounds", f"sum by (run) (rate({_FED}_rounds_total[5m]))"),
              ("{{run}} updates", f"sum by (run) (rate({_FED}_updates_total[5m]))"))),
        Panel("A round, in real time", "s", (("{{run}} mean", f"sum by (run) (rate({_FED}_round_seconds_sum[5m]))"
              f" / sum by (run) (rate({_FED}_round_seconds_count[5m]))"),)),
        Panel("Held-out accuracy of the global model", "percentunit", (
              ("{{run}} clean", f"max by (run) ({_FED}_clean_accuracy_ratio)"),
              ("{{run}} robust", f"max by (run) ({_FED}_robust_accuracy_ratio)"),
              ("{{run}} one client in twenty below", f"max by (run) ({_FED}_low_client_accuracy_ratio)"))),
        Panel("Loss of the clients", "short", ((_BY_RUN, f"max by (run) ({_FED}_train_loss)"),)),
        Panel("Virtual clock", "s", ((_BY_RUN, f"max by (run) ({_FED}_clock_seconds)"),)),
        Panel("Bytes so far, all clients", "bytes", tuple(
              (f"{{{{run}}}} {kind.replace('_', ' ')}", f"sum by (run) ({_FED}_{kind}_bytes_total)")
              for kind in ("download", "upload", "wasted_download", "wasted_upload"))),
        Panel("Clients' time so far", "s", tuple(
              (f"{{{{run}}}} {kind}", f"sum by (run) ({_FED}_{kind}_seconds_total)")
              for kind in ("compute", "download", "upload", "wait"))),
        Panel("Updates that did not count", "short", tuple(
              (f"{{{{run}}}} {kind}", f"sum by (run) ({_FED}_{kind}_updates_total)")
              for kind in ("late", "surplus", "lost", "nonfinite"))),
        Panel("Time since the last round", "s", (
              (_BY_RUN, f"time() - max by (run) ({_FED}_last_round_timestamp_seconds)"),), "stat", 6),
    )),
)  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The JSON model Grafana imports; it asks for the Prometheus data source and offers every run."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": y},
                "id": len(panels) + 1,
                "panels": [],
            }
        )
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > 24:
                x, y = 0, y + 8
            panels.append(_panel(panel, len(panels) + 1, x, y))
            x += panel.width
        y += 8
    return {
        "uid": "distrobust",
        "title": "distrobust",
        "tags": ["distrobust"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def text() -> str:
    """The same as a file."""
    return json.dumps(dashboard(), indent=1) + "\n"


def metrics_in(expression: str) -> list[str]:
    """The table's names of the metrics in an expression: a histogram's series have its name.

    Raises KeyError for a name of ours that the table does not have.
    """
    names = []
    for name in re.findall(r"\bdistrobust_[a-z_]+", expression):
        known = name if name in _HELP else _HISTOGRAM.sub("", name)
        if known not in _HELP:
            raise KeyError(name)
        names.append(known)
    return names


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    first = metrics_in(panel.queries[0][1])[0]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help or _HELP[first],
        "id": number,
        "gridPos": {"h": 8, "w": panel.width, "x": x, "y": y},
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": re.sub(r"(distrobust_[a-z_]+)", rf"\1{_WHERE}", expression),
                "legendFormat": legend,
            }
            for index, (legend, expression) in enumerate(panel.queries)
        ],
    }


_SOURCE = {"type": "prometheus", "uid": "${source}"}


def _variables() -> list[dict[str, Any]]:
    runs = "label_values(distrobust_build_info, run)"
    return [
        {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": runs, "refId": "run"},
            "definition": runs,
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]
