"""What a namespace needs once, for all runs: it outlives them, and deleting a run leaves it alone."""

from __future__ import annotations

from distrobust.config import Config
from distrobust.k8s import Document, inside, pods

FILES = "distrobust-files"
"""A pod without network, for putting data onto the claim and taking reports from it (kubectl exec, kubectl cp)."""
_LABELS = {"app.kubernetes.io/part-of": "distrobust"}


def documents(config: Config) -> list[Document]:
    """Service account, claim, and the pod for files."""
    return [_account(), _claim(config), _no_network(), _files(config)]


def _account() -> Document:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": pods.ACCOUNT, "labels": _LABELS},
        "automountServiceAccountToken": False,
    }


def _claim(config: Config) -> Document:
    settings = config.kubernetes
    specification: Document = {
        "accessModes": [settings.access_mode],
        "resources": {"requests": {"storage": settings.claim_size}},
    }
    if settings.storage_class is not None:
        specification["storageClassName"] = settings.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": settings.claim, "labels": _LABELS},
        "spec": specification,
    }


def _files(config: Config) -> Document:
    own = {**_LABELS, pods.ROLE: "files"}
    container: Document = {
        "name": "files",
        "image": inside.image(config),
        "command": ["sleep", "infinity"],
        "env": [{"name": "HOME", "value": "/tmp"}],
        "workingDir": str(inside.SHARED),
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"cpu": "2", "memory": "4Gi"}},
        "securityContext": pods.CONTAINER_SECURITY,
        "volumeMounts": [pods.claim_mount(), {"name": "tmp", "mountPath": "/tmp"}],
    }
    volumes = [pods.claim_volume(config), {"name": "tmp", "emptyDir": {}}]
    pod = {**pods.unprivileged(container, volumes), "terminationGracePeriodSeconds": 5}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": FILES, "labels": own},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": own},
            "template": {"metadata": {"labels": own}, "spec": pod},
        },
    }


def _no_network() -> Document:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": FILES, "labels": _LABELS},
        "spec": {"podSelector": {"matchLabels": {pods.ROLE: "files"}}, "policyTypes": ["Ingress", "Egress"]},
    }
