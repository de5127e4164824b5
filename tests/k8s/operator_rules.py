"""What the KubeRay operator refuses although its schema allows it, and what Kueue refuses of a RayJob.

Written down from the operator's validation (ray-operator/controllers/ray/utils/validation.go), as far as it concerns
what a manifest of ours could say; read, not tried on a cluster.
"""

import re
from collections.abc import Iterator
from typing import Any

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def problems(job: dict[str, Any]) -> list[str]:
    """Of a RayJob, each in a line; empty if the operator would take it."""
    return list(_job(job)) + list(_cluster(job["spec"].get("rayClusterSpec") or {}))


def _job(job: dict[str, Any]) -> Iterator[str]:
    name, spec = job["metadata"]["name"], job["spec"]
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "the name has at most 47 characters of DNS-1035"
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        yield "exactly one of rayClusterSpec and clusterSelector"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished goes with shutdownAfterJobFinishes"
    if spec.get("submissionMode") == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & spec.keys():
        yield "SidecarMode has no submitter pod"
    if "clusterSelector" in spec and spec.get("backoffLimit", 0):
        yield "backoffLimit does not go with clusterSelector"
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit", 0):
        yield "backoffLimit does not go with InteractiveMode"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "only a job that shuts its cluster down can be suspended"
    if spec.get("activeDeadlineSeconds", 1) <= 0 or spec.get("backoffLimit", 0) < 0:
        yield "activeDeadlineSeconds is above 0, backoffLimit at least 0"
    if QUEUE_LABEL in job["metadata"].get("labels", {}):
        if not spec.get("shutdownAfterJobFinishes") or "clusterSelector" in spec:
            yield "Kueue wants a cluster of the job's own, shut down with it"
        if (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"):
            yield "Kueue takes no autoscaling job"


def _cluster(cluster: dict[str, Any]) -> Iterator[str]:
    groups = cluster.get("workerGroupSpecs", [])
    for group in groups:
        if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31):
            yield "minReplicas is at most maxReplicas"
        if not group.get("minReplicas", 0) <= group["replicas"] <= group.get("maxReplicas", 2**31):
            yield "replicas lies between minReplicas and maxReplicas"
    for group in [*groups, cluster["headGroupSpec"]] if cluster else []:
        started = group.get("rayStartParams", {})
        containers = group["template"]["spec"]["containers"]
        if not containers:
            yield "a group has at least one container"
        named = {variable["name"] for container in containers[:1] for variable in container.get("env", ())}
        if {"RAY_REDIS_ADDRESS", "REDIS_USERNAME"} & named or "redis-username" in started:
            yield "Redis is configured by gcsFaultToleranceOptions"
        if {"num-cpus", "num-gpus", "memory", "resources"} & started.keys() and group.get("resources"):
            yield "resources are said in rayStartParams or in the group, not in both"
        if "labels" in started:
            yield "labels are the group's, not rayStartParams'"
    if (cluster.get("authOptions") or {}).get("mode") == "token":
        version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2])
        if version < (2, 52):
            yield "token authentication needs rayVersion 2.52"
