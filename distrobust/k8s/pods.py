"""The pods of a run. All of them unprivileged: user 1000, no capabilities, a root file system that nobody writes to.

The operator adds to them what is Ray's: the start command, probes (which need wget in the image), the port `metrics`,
the wait for the head, and the token of `authOptions`.
"""

from __future__ import annotations

from typing import Any

from distrobust.config import Config
from distrobust.k8s import Document, inside

ACCOUNT = "distrobust"
"""The service account; it is allowed nothing and its token is not mounted."""
RUN, ROLE = "distrobust/run", "distrobust/role"
"""Labels: which run a pod belongs to, and whether it is its head, worker or submitter."""
EXPORTER = "distrobust"
"""Name of the port of the program's metrics."""
RAY_METRICS = "metrics"
"""Name of the port of Ray's metrics, 8080, which the operator adds."""
GRACE_S = 120
"""For a checkpoint that is being written when a pod is asked to go."""
_OBJECT_STORE_BYTES = 512 * 1024**2  # numbers travel between ranks directly: Ray's own store stays nearly empty

POD_SECURITY: Document = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 100,
    "fsGroup": 100,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: Document = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def labels(config: Config, role: str) -> dict[str, str]:
    return {"app.kubernetes.io/part-of": "distrobust", RUN: inside.name(config), ROLE: role}


def head(config: Config) -> Document:
    """Ray's head group: the driver runs here, and no worker."""
    memory = config.kubernetes.head_memory
    container = _ray_container(config, "ray-head")
    container["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
    ]
    container["resources"] = {"requests": {"cpu": "1", "memory": memory}, "limits": {"cpu": "2", "memory": memory}}
    return {
        "rayStartParams": _start_parameters("0"),
        "template": _template(labels(config, "head"), _ray_pod(config, container)),
    }


def workers(config: Config) -> Document:
    """Ray's worker group: one rank a pod, whatever its size, so that every exporter has its port to itself."""
    settings, own = config.cluster, labels(config, "worker")
    # a core besides those of torch: for Ray's own processes, and for coding gradients while torch computes
    amounts = {"cpu": str(settings.threads + 1), "memory": config.kubernetes.memory}
    if settings.gpu:
        amounts["nvidia.com/gpu"] = "1"
    container = _ray_container(config, "ray-worker")
    container["ports"] = [{"name": EXPORTER, "containerPort": config.metrics.port}]
    container["resources"] = {"requests": amounts, "limits": dict(amounts)}
    pod = _ray_pod(config, container)
    pod["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": own},
        }
    ]
    if settings.gpu:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    template = _template(own, pod)
    if limit := config.kubernetes.bandwidth:
        ways = ("ingress", "egress")
        template["metadata"]["annotations"] = {f"kubernetes.io/{way}-bandwidth": limit for way in ways}
    return {
        "groupName": "workers",
        "replicas": settings.workers,
        "minReplicas": settings.workers,
        "maxReplicas": settings.workers,
        # only as many as one rank uses: with more, Ray would put two ranks into one pod
        "rayStartParams": _start_parameters(str(settings.threads)),
        "template": template,
    }


def submitter(config: Config) -> Document:
    """Hands the entrypoint to the head and follows its log; the operator writes its command."""
    container: Document = {
        "name": "ray-job-submitter",
        "image": inside.image(config),
        "env": _environment(),
        "resources": {
            "requests": {"cpu": "200m", "memory": "512Mi"},
            "limits": {"cpu": "1", "memory": "1Gi"},
        },
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    pod = {**unprivileged(container, [{"name": "tmp", "emptyDir": {}}]), "restartPolicy": "Never"}
    return _template(labels(config, "submitter"), pod)


def claim_volume(config: Config) -> Document:
    return {"name": "shared", "persistentVolumeClaim": {"claimName": config.kubernetes.claim}}


def claim_mount() -> Document:
    return {"name": "shared", "mountPath": str(inside.SHARED)}


def unprivileged(container: Document, volumes: list[Any]) -> Document:
    """The specification of any pod of ours."""
    return {
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "securityContext": POD_SECURITY,
        "containers": [container],
        "volumes": volumes,
    }


def _ray_pod(config: Config, container: Document) -> Document:
    volumes = [
        claim_volume(config),
        {"name": "config", "configMap": {"name": config_name(config)}},
        {"name": "tmp", "emptyDir": {}},
        # 64 MB without it; counts against the pod's memory
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
    ]
    return {**unprivileged(container, volumes), "terminationGracePeriodSeconds": GRACE_S}


def config_name(config: Config) -> str:
    """Of the ConfigMap with the configuration."""
    return f"{inside.name(config)}-config"


def _ray_container(config: Config, name: str) -> Document:
    return {
        "name": name,
        "image": inside.image(config),
        "env": _environment(),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            claim_mount(),
            {"name": "config", "mountPath": str(inside.CONFIG.parent), "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _environment() -> list[Any]:
    return [{"name": "HOME", "value": "/tmp"}]  # all that can be written to besides the claim


def _start_parameters(num_cpus: str) -> dict[str, str]:
    return {"num-cpus": num_cpus, "object-store-memory": str(_OBJECT_STORE_BYTES)}


def _template(labels: dict[str, str], pod: Document) -> Document:
    return {"metadata": {"labels": labels}, "spec": pod}
