"""Every document against the schemas of those who will read it, where they are at hand."""

import json
import os
from pathlib import Path

import pytest
import yaml

from distrobust.k8s import Document
from tests.k8s.rendered import CASES, EXAMPLE, K8S, NAMES, all_documents, run_documents, the

SCHEMAS = os.environ.get("DISTROBUST_KUBERAY_SCHEMAS")
OURS = ("ray.io/", "monitoring.coreos.com/", "kueue.x-k8s.io/")  # custom resources: not part of Kubernetes' own schemas
EXAMPLES = [
    document for path in sorted((K8S / "examples").glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
needs_schemas = pytest.mark.skipif(
    SCHEMAS is None, reason="set DISTROBUST_KUBERAY_SCHEMAS to a directory with rayjob-v1.json, from KubeRay's CRDs"
)


@needs_schemas
@pytest.mark.parametrize(("file", "overlay"), CASES, ids=NAMES)
def test_every_ray_job_is_of_kuberays_schema(file: Path, overlay: str | None) -> None:
    assert _problems(the(run_documents(file, overlay, "kubernetes.bandwidth=1G"), "RayJob")) == []


@needs_schemas
def test_the_schema_refuses_what_it_does_not_know() -> None:
    job = the(run_documents(EXAMPLE, None), "RayJob")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    assert _problems(job)


@pytest.mark.parametrize(("file", "overlay"), CASES, ids=NAMES)
def test_every_core_object_is_of_kubernetes_schema(file: Path, overlay: str | None) -> None:
    _check_core([*all_documents(file, overlay), *EXAMPLES])


@pytest.mark.parametrize(("file", "overlay"), CASES[:2], ids=NAMES[:2])
def test_every_pod_of_a_ray_job_is_one_to_kubernetes(file: Path, overlay: str | None) -> None:
    job = the(run_documents(file, overlay), "RayJob")["spec"]
    cluster = job["rayClusterSpec"]
    found = [job["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    found += [group["template"] for group in cluster["workerGroupSpecs"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": t["spec"]} for t in found]
    _check_core(pods)


def test_kubernetes_schema_refuses_what_it_does_not_know() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    broken = the(all_documents(EXAMPLE, None), "PersistentVolumeClaim")
    broken["spec"]["accessMode"] = "ReadWriteMany"
    with pytest.raises(validate.ValidationError):
        _check_core([broken])


def _check_core(documents: list[Document]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    core = [document for document in documents if not document["apiVersion"].startswith(OURS)]
    assert core
    for document in core:
        validate.validate(document, validate.latest_version(), strict=True)


def _problems(job: Document) -> list[str]:
    from jsonschema import Draft202012Validator

    assert SCHEMAS is not None
    schema = json.loads((Path(SCHEMAS) / "rayjob-v1.json").read_text())
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(job)]
