"""Overlays are named sets of overrides. As kustomize patches they are computed: the difference two renderings make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrobust.errors import ConfigError
from distrobust.k8s import Document

OVERLAYS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cluster.gpu=false", "kubernetes.memory=4Gi", "kubernetes.head_memory=4Gi"),
    "gpu": ("cluster.gpu=true", "cluster.threads=4", "kubernetes.memory=16Gi"),
    "kueue": ("kubernetes.queue=distrobust",),
}
"""What --overlay sets; --set comes after it."""


def overrides(overlay: str | None) -> tuple[str, ...]:
    """Of an overlay; none for None."""
    if overlay is None:
        return ()
    if overlay not in OVERLAYS:
        raise ConfigError(f"--overlay: got {overlay!r}, wanted one of {', '.join(OVERLAYS)}")
    return OVERLAYS[overlay]


def kustomization(base: list[Document], wanted: list[Document], resource: str) -> Document:
    """The kustomization that makes `wanted` of `base`, which is at `resource`.

    Both hold the same objects, in any order.
    """
    before, after = ({key(document): document for document in documents} for documents in (base, wanted))
    if before.keys() != after.keys():
        raise ValueError(f"an overlay changes objects, not which there are: {sorted(before.keys() ^ after.keys())}")
    patches = []
    for kind, name in after:
        operations = difference(before[kind, name], after[kind, name])
        if operations:
            patches.append({"target": {"kind": kind, "name": name}, "patch": operations})
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [resource],
        "patches": patches,
    }


def key(document: Document) -> tuple[str, str]:
    """Kind and name: all objects of ours are of one namespace."""
    return document["kind"], document["metadata"]["name"]


def difference(before: Any, after: Any, path: str = "") -> list[dict[str, Any]]:
    """JSON patch operations (RFC 6902) that turn one value into the other; lists of another length are replaced."""
    if isinstance(before, dict) and isinstance(after, dict):
        operations: list[dict[str, Any]] = []
        for name in before | after:
            where = f"{path}/{str(name).replace('~', '~0').replace('/', '~1')}"
            if name not in after:
                operations.append({"op": "remove", "path": where})
            elif name not in before:
                operations.append({"op": "add", "path": where, "value": after[name]})
            else:
                operations += difference(before[name], after[name], where)
        return operations
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [operation for index, (b, a) in pairs for operation in difference(b, a, f"{path}/{index}")]
    return [] if before == after else [{"op": "replace", "path": path, "value": after}]
