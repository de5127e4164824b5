"""Everything that can be rendered, and walks over documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from distrobust import config
from distrobust.k8s import Document, monitoring, namespace, overlays, run
from distrobust.k8s.inside import CONFIG

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
EXAMPLE = ROOT / "launch/digits.yaml"
LAUNCH_FILES = sorted(p for p in (ROOT / "launch").glob("*.yaml") if not p.name.startswith("federated-"))
CASES = [(file, overlay) for file in LAUNCH_FILES for overlay in (None, *overlays.OVERLAYS)]
NAMES = [f"{file.stem}-{overlay}" for file, overlay in CASES]


def run_documents(file: Path, overlay: str | None, *overrides: str) -> list[Document]:
    return run.documents(config.load(file, [*overlays.overrides(overlay), *overrides]))


def all_documents(file: Path, overlay: str | None) -> list[Document]:
    """A run's, and its namespace's."""
    loaded = config.load(file, overlays.overrides(overlay))
    return [*run.documents(loaded), *namespace.documents(loaded), *monitoring.documents()]


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def the(documents: list[Document], kind: str) -> Document:
    [document] = of_kind(documents, kind)
    return document


def groups(job: Document) -> list[Document]:
    """Head and worker groups."""
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def templates(documents: list[Document]) -> Iterator[Document]:
    """Every pod template."""
    for document in documents:
        if document["kind"] == "RayJob":
            yield document["spec"]["submitterPodTemplate"]
            yield from (group["template"] for group in groups(document))
        elif document["kind"] == "Deployment":
            yield document["spec"]["template"]


def job_file(documents: list[Document]) -> dict[str, Any]:
    """The configuration in a run's ConfigMap."""
    content = next(d["data"][CONFIG.name] for d in of_kind(documents, "ConfigMap") if CONFIG.name in d["data"])
    return yaml.safe_load(content)  # type: ignore[no-any-return]
