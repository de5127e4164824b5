"""What deserves to wake somebody: one table of alerts, for Prometheus with or without its operator.

Each alert carries what it means and what to do first. Names of metrics are those of table.py, `up` is Prometheus' own.
A scrape job named `distrobust` is assumed (JOB), as in the PodMonitor and in the plain scrape
configuration of k8s/monitoring.
"""

from dataclasses import dataclass
from typing import Any, Literal

JOB = "distrobust"
SCRAPE_S = 15
"""Seconds between scrapes. Exporters should stay for two of them after the end of a run (metrics.linger_s)."""


@dataclass(frozen=True)
class Alert:
    """`expr` holds for `wait_s` seconds before somebody is told; `runbook`: the first thing to look at or to do."""

    name: str
    expr: str
    wait_s: int
    severity: Literal["critical", "warning"]
    summary: str
    runbook: str


ALERTS = (
    Alert(
        "DistrobustNoStep",
        "max by (run) (distrobust_training) == 1\n"
        "and time() - max by (run)"
        " (distrobust_last_step_timestamp_seconds or distrobust_training_change_timestamp_seconds) > 300",
        0,
        "critical",
        "Run {{ $labels.run }} has not finished a step for five minutes.",
        "A worker that died or hangs stops the others until cluster.timeout_s: look for restarting pods, then where "
        "each rank is (RUN/stacks, after half of that time) and what it said (RUN/logs). Records come every "
        "metrics.every steps: lower it if those take longer than five minutes. Scoring held-out images "
        "after an epoch counts too: evaluate.held_out_images limits it.",
    ),
    Alert(
        "DistrobustNonFiniteSteps",
        "max by (run, phase) (increase(distrobust_nonfinite_steps_total[10m])) > 0",
        0,
        "warning",
        "Run {{ $labels.run }} skips steps in phase {{ $labels.phase }}: gradients are not finite.",
        "A few are skipped without a trace; after max_skipped_steps in a row the run ends. Lower the phase's "
        "schedule.peak, set precision=fp32, or look at the data.",
    ),
    Alert(
        "DistrobustResidualGrows",
        "distrobust_comm_residual_norm_ratio > 2 * (distrobust_comm_residual_norm_ratio offset 30m)\n"
        "and distrobust_comm_density_ratio == (distrobust_comm_density_ratio offset 30m)",
        600,
        "warning",
        "Run {{ $labels.run }}, rank {{ $labels.rank }}: the residual has more than doubled within half an hour.",
        "What is kept back outgrows what is sent: raise compress.density (or lower compress.fewer_bytes), or lower the "
        "phase's schedule.peak, and continue from the last checkpoint under a new run.dir.",
    ),
    Alert(
        "DistrobustReplicasDiverged",
        "max by (run) (max_over_time(distrobust_diverged_replicas[15m])) > 0",
        0,
        "critical",
        "Run {{ $labels.run }} has ended: {{ $value }} ranks no longer hold the parameters of rank 0.",
        "Start again: it continues from the last checkpoint, where they agreed. If it comes back, look for a host with "
        "faulty memory or another version of the program (distrobust_build_info).",
    ),
    Alert(
        "DistrobustCheckpointFailing",
        "max by (run) (increase(distrobust_checkpoint_failures_total[30m])) > 0",
        0,
        "critical",
        "Run {{ $labels.run }} cannot write checkpoints; a restart would lose everything since the last one.",
        "RUN/logs say why: a full or read-only claim, most often. Make room; training goes on meanwhile.",
    ),
    Alert(
        "DistrobustExporterDown",
        f'up{{job="{JOB}"}} == 0',
        120,
        "warning",
        "{{ $labels.instance }} does not answer Prometheus.",
        "Is the pod running, does a network policy let Prometheus in, and did the exporter take another port? "
        "RUN/logs and RUN/prometheus say which.",
    ),
    Alert(
        "DistrobustExporterMissing",
        "max by (run) (distrobust_workers) > count by (run) (distrobust_workers)",
        300,
        "warning",
        "Of run {{ $labels.run }} fewer exporters are seen than it has workers.",
        "Compare Prometheus' targets with RUN/prometheus/: a worker that shares its host serves on another port.",
    ),
)


def groups() -> list[dict[str, Any]]:
    """The rule groups: `groups` of a plain rule file and `spec.groups` of a PrometheusRule."""
    return [{"name": "distrobust", "rules": [_rule(alert) for alert in ALERTS]}]


def _rule(alert: Alert) -> dict[str, Any]:
    rule: dict[str, Any] = {"alert": alert.name, "expr": alert.expr}
    if alert.wait_s:
        rule["for"] = f"{alert.wait_s}s"
    rule["labels"] = {"severity": alert.severity}
    rule["annotations"] = {"summary": alert.summary, "runbook": alert.runbook}
    return rule
