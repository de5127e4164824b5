"""All generated files of the repository's k8s/ directory, and documents as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from distrobust import config as configuration
from distrobust.config import Config
from distrobust.errors import ConfigError
from distrobust.k8s import Document, monitoring, namespace, overlays, run
from distrobust.metrics import dashboard

PARTS: Mapping[str, Callable[[Config], list[Document]]] = {
    "run": run.documents,
    "namespace": namespace.documents,
    "monitoring": lambda _: monitoring.documents(),
}
"""What can be rendered: a run, and what a namespace needs once."""
ONE_NODE = ("kubernetes.access_mode=ReadWriteOnce",)
_HEAD = "# Made by `distrobust k8s write`, which a test holds this file to: change the program, not the file.\n"


def render(file: Path, overrides: tuple[str, ...], overlay: str | None, part: str) -> str:
    """The manifest of a configuration file as YAML; raises ConfigError."""
    config = configuration.load(file, [*overlays.overrides(overlay), *overrides])
    return text(PARTS[part](config))


def write(directory: Path, example: Path) -> list[Path]:
    """Writes `files` below `directory`; returns what has changed."""
    changed = []
    for name, content in files(example).items():
        path = directory / name
        if not path.exists() or path.read_text() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            changed.append(path)
    return changed


def files(example: Path) -> dict[str, str]:
    """Path below k8s/ -> content. `example`: launch/digits.yaml, which the base runs."""
    if example.name != "digits.yaml":
        raise ConfigError(f"k8s write: got {example}, wanted the repository's launch/digits.yaml")

    def config(*overrides: str) -> Config:
        return configuration.load(example, overrides)

    base, once = run.documents(config()), namespace.documents(config())
    made = {
        "base/run.yaml": text(base),
        "base/kustomization.yaml": _kustomization("run.yaml"),
        "namespace/namespace.yaml": text(once),
        "namespace/kustomization.yaml": _kustomization("namespace.yaml"),
        "namespace-one-node/kustomization.yaml": _overlay(once, namespace.documents(config(*ONE_NODE)), "../namespace"),
        "monitoring/monitoring.yaml": text(monitoring.documents()),
        "monitoring/kustomization.yaml": _kustomization("monitoring.yaml"),
        "monitoring/rules.yaml": text([monitoring.rule_file()]),
    }
    for name, values in overlays.OVERLAYS.items():
        made[f"overlays/{name}/kustomization.yaml"] = _overlay(base, run.documents(config(*values)), "../../base")
    made = {path: _HEAD + content for path, content in made.items()}
    made["monitoring/dashboard.json"] = dashboard.text()
    return made


def text(documents: list[Document]) -> str:
    """As YAML, `---` between documents, text of several lines as it is read."""
    return "---\n".join(yaml.dump(d, Dumper=_Dumper, sort_keys=False, width=120) for d in documents)


def _kustomization(resource: str) -> str:
    content = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [resource]}
    return text([content])


def _overlay(base: list[Document], wanted: list[Document], resource: str) -> str:
    content = overlays.kustomization(base, wanted, resource)
    for patch in content["patches"]:
        patch["patch"] = text([patch["patch"]])
    return text([content])


class _Dumper(yaml.SafeDumper):
    """Without aliases, which a reader would have to resolve, and with block text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)
