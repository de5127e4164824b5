"""What one run is to Kubernetes: a RayJob, its configuration, who may talk to it and what may not evict it."""

from __future__ import annotations

from typing import Any

from distrobust.config import Config
from distrobust.k8s import Document, inside, pods

RAY_VERSION = "2.60.0"
"""Of the image (constraints.txt); token authentication needs at least 2.52."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
STARTING_S = 3600
"""For pulling images and starting the cluster."""
KEPT_S = 600
"""How long the finished cluster stays, for its logs."""
DASHBOARD, RAY_METRICS_PORT, DNS = 8265, 8080, 53


def documents(config: Config) -> list[Document]:
    """In the order in which they should be made. Raises ConfigError for a configuration that no cluster can run."""
    config = inside.inside(config)
    return [_config_map(config), _network_policy(config), _disruption_budget(config), _ray_job(config)]


def _metadata(config: Config, name: str) -> Document:
    return {"name": name, "labels": {"app.kubernetes.io/part-of": "distrobust", pods.RUN: inside.name(config)}}


def _config_map(config: Config) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(config, pods.config_name(config)),
        "data": {inside.CONFIG.name: inside.text(config)},
    }


def _ray_job(config: Config) -> Document:
    """A run that dies with its head is started anew by the operator, on a new cluster, and continues by its run.dir."""
    settings = config.kubernetes
    metadata = _metadata(config, inside.name(config))
    if settings.queue is not None:
        metadata["labels"][QUEUE_LABEL] = settings.queue
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "entrypoint": f"distrobust train {inside.CONFIG}",
            "submissionMode": "K8sJobMode",
            "backoffLimit": settings.retries,
            "activeDeadlineSeconds": settings.deadline_s,
            "preRunningDeadlineSeconds": min(STARTING_S, settings.deadline_s),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_S,
            "submitterPodTemplate": pods.submitter(config),
            "rayClusterSpec": {
                "rayVersion": RAY_VERSION,
                "authOptions": {"mode": "token"},  # made by the operator: whoever may submit jobs may run anything
                "headGroupSpec": pods.head(config),
                "workerGroupSpecs": [pods.workers(config)],
            },
        },
    }


def _disruption_budget(config: Config) -> Document:
    """Evicting any one pod would stop all of them: draining a node waits for the run, or for its suspension."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(config, inside.name(config)),
        "spec": {
            "minAvailable": config.cluster.workers + 1,
            "selector": {
                "matchLabels": {pods.RUN: inside.name(config)},
                "matchExpressions": [{"key": pods.ROLE, "operator": "In", "values": ["head", "worker"]}],
            },
        },
    }


def _network_policy(config: Config) -> Document:
    """A run's pods talk to each other and ask for names; the operator and Prometheus may come in, nobody else."""
    own = {"podSelector": {"matchLabels": {pods.RUN: inside.name(config)}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(config, inside.name(config)),
        "spec": {
            **own,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own]},
                {"from": [_anywhere("kuberay-operator")], "ports": _ports(DASHBOARD)},
                {"from": [_anywhere("prometheus")], "ports": _ports(RAY_METRICS_PORT, config.metrics.port)},
            ],
            "egress": [
                {"to": [own]},
                {"ports": [{"protocol": "UDP", "port": DNS}, {"protocol": "TCP", "port": DNS}]},
            ],
        },
    }


def _anywhere(app: str) -> Document:
    """Pods of that name in any namespace."""
    return {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": app}}}


def _ports(*numbers: int | None) -> list[Any]:
    return [{"protocol": "TCP", "port": number} for number in numbers]
