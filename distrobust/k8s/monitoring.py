"""What Prometheus' operator and Grafana are told, once a namespace; and the rules alone, where there is no operator."""

from __future__ import annotations

from typing import Any

from distrobust.k8s import Document, pods
from distrobust.metrics import alerts, dashboard

_LABELS = {"app.kubernetes.io/part-of": "distrobust"}
DASHBOARD_LABELS = {"grafana_dashboard": "1"}  # what Grafana's sidecar looks for, unless told otherwise


def documents() -> list[Document]:
    return [_pod_monitor(), _rules(), _dashboard()]


def rule_file() -> Document:
    """For `rule_files` of a plain Prometheus."""
    return {"groups": alerts.groups()}


def _pod_monitor() -> Document:
    def endpoint(port: str, job: str) -> dict[str, Any]:
        relabelings = [{"targetLabel": "job", "replacement": job}]
        return {"port": port, "path": "/metrics", "interval": f"{alerts.SCRAPE_S}s", "relabelings": relabelings}

    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "distrobust", "labels": _LABELS},
        "spec": {
            "selector": {"matchExpressions": [{"key": pods.ROLE, "operator": "In", "values": ["head", "worker"]}]},
            "podMetricsEndpoints": [endpoint(pods.EXPORTER, alerts.JOB), endpoint(pods.RAY_METRICS, "ray")],
        },
    }


def _rules() -> Document:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "distrobust", "labels": _LABELS},
        "spec": rule_file(),
    }


def _dashboard() -> Document:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "distrobust-dashboard", "labels": {**_LABELS, **DASHBOARD_LABELS}},
        "data": {"distrobust.json": dashboard.text()},
    }
