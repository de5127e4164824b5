"""The configuration as it is run inside a cluster, and the names that follow from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from distrobust import __version__
from distrobust.config import Config
from distrobust.errors import ConfigError
from distrobust.metrics import alerts

SHARED = Path("/shared")
"""Where the claim is mounted in every pod."""
CONFIG = Path("/config/job.yaml")
"""Where the configuration is mounted in every pod of a run."""
LINGER_S = 2.0 * alerts.SCRAPE_S
"""An exporter's last values stay for two scrapes."""
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")


def inside(config: Config) -> Config:
    """`config` as its pods read it: paths on the claim, Ray's address, the pods' interface, an exporter to be reached.

    Raises ConfigError for what cannot be had in a cluster.
    """
    metrics = config.metrics
    if not metrics.port:
        raise ConfigError(
            f"metrics.port: got {metrics.port}, wanted a number above 0 that the manifest can announce to Prometheus; "
            "leave it at 9400"
        )
    on_claim: Config = _on_claim(config, "")
    cluster = {"launcher": "ray", "address": "auto", "interface": config.cluster.interface or "eth0"}
    served = {"host": "0.0.0.0", "linger_s": max(metrics.linger_s, LINGER_S)}
    return on_claim.model_copy(
        update={
            "cluster": on_claim.cluster.model_copy(update=cluster),
            "metrics": on_claim.metrics.model_copy(update={"port": metrics.port, **served}),
        }
    )


def text(config: Config) -> str:
    """What was given and what `inside` set, as YAML: defaults are those of the image's program."""
    given = config.model_dump(mode="json", exclude_unset=True, exclude={"kubernetes"})
    return yaml.safe_dump(given, sort_keys=False).rstrip()  # kustomize 5.5 strips the last newline of a patch


def name(config: Config) -> str:
    """Of the RayJob and what belongs to it; at most 47 characters, since the operator appends to it."""
    if config.kubernetes.name is not None:
        return config.kubernetes.name
    last = config.run.dir.name
    if not _NAME.fullmatch(last):
        raise ConfigError(
            f"kubernetes.name: run.dir ends in {last!r}, wanted at most 47 lower-case letters, digits and dashes, a "
            "letter first; pass --set kubernetes.name=..."
        )
    return last


def image(config: Config) -> str:
    """As k8s/README.md builds it, unless the configuration names another."""
    return config.kubernetes.image or f"distrobust:{__version__}-{'cuda' if config.cluster.gpu else 'cpu'}"


def _on_claim(section: Any, place: str) -> Any:
    """A section whose paths, at any depth, are on the claim."""
    changed: dict[str, Any] = {}
    for key, value in section:
        where = f"{place}.{key}".removeprefix(".")
        if isinstance(value, Path):
            changed[key] = SHARED / value
            if not (SHARED / value).is_relative_to(SHARED) or ".." in value.parts:
                raise ConfigError(
                    f"{where}: got {value}, wanted a relative path, or one below {SHARED}, where the claim is mounted; "
                    "copy what is there onto the claim (k8s/README.md)"
                )
        elif isinstance(value, BaseModel):
            inner = _on_claim(value, where)
            if inner is not value:
                changed[key] = inner
    return section.model_copy(update=changed) if changed else section
