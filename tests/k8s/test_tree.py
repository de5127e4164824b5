"""k8s/ and `distrobust k8s render` say the same: generated files are up to date, overlays amount to renderings."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from distrobust import config
from distrobust.errors import ConfigError
from distrobust.k8s import Document, namespace, overlays, tree
from distrobust.k8s.overlays import difference, key
from tests.k8s.rendered import EXAMPLE, K8S, run_documents

KUBECTL = shutil.which("kubectl")
KUSTOMIZATIONS = sorted(path.parent.relative_to(K8S) for path in K8S.rglob("kustomization.yaml"))
each_kustomization = pytest.mark.parametrize("directory", KUSTOMIZATIONS, ids=str)


def test_the_files_in_k8s_are_what_the_program_makes() -> None:
    made = tree.files(EXAMPLE)
    stale = [name for name, content in made.items() if not (K8S / name).exists() or (K8S / name).read_text() != content]
    assert stale == [], "run `distrobust k8s write`"


def test_write_brings_files_up_to_date_and_leaves_the_others_alone(tmp_path: Path) -> None:
    assert {str(path.relative_to(tmp_path)) for path in tree.write(tmp_path, EXAMPLE)} == set(tree.files(EXAMPLE))
    (tmp_path / "base/run.yaml").write_text("stale")
    (tmp_path / "own.yaml").write_text("own")
    assert tree.write(tmp_path, EXAMPLE) == [tmp_path / "base/run.yaml"]
    assert (tmp_path / "own.yaml").read_text() == "own"


def test_only_the_repositorys_example_is_the_base() -> None:
    with pytest.raises(ConfigError, match=r"wanted the repository's launch/digits\.yaml"):
        tree.files(EXAMPLE.with_name("cifar10.yaml"))


@each_kustomization
def test_every_resource_exists_and_every_patch_meets_its_object(directory: Path) -> None:
    content = yaml.safe_load((K8S / directory / "kustomization.yaml").read_text())
    assert content["resources"]
    objects = {key(document) for document in _build(K8S / directory, patched=False)}
    for patch in content.get("patches", ()):
        assert (patch["target"]["kind"], patch["target"]["name"]) in objects


@pytest.mark.parametrize("overlay", overlays.OVERLAYS)
def test_an_overlay_is_the_rendering_with_its_overrides(overlay: str) -> None:
    assert _by_key(_build(K8S / "overlays" / overlay)) == _by_key(run_documents(EXAMPLE, overlay))


def test_one_node_is_the_rendering_with_a_claim_for_one_node() -> None:
    wanted = namespace.documents(config.load(EXAMPLE, tree.ONE_NODE))
    assert _by_key(_build(K8S / "namespace-one-node")) == _by_key(wanted)
    assert wanted != namespace.documents(config.load(EXAMPLE))


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
@each_kustomization
def test_kubectl_builds_the_same(directory: Path) -> None:
    assert KUBECTL is not None
    built = subprocess.run(
        [KUBECTL, "kustomize", str(K8S / directory)], capture_output=True, text=True, timeout=60, check=True
    )
    assert _by_key(list(yaml.safe_load_all(built.stdout))) == _by_key(_build(K8S / directory))


def test_the_difference_of_two_values_turns_one_into_the_other() -> None:
    before = {"a": 1, "b": {"c/d~": [1, 2], "e": "x"}, "gone": 0, "list": [1, {"in": 1}], "same": [1]}
    after = {"a": 2, "b": {"c/d~": [1], "e": "x"}, "new": {"y": None}, "list": [1, {"in": 2}], "same": [1]}
    operations = difference(before, after)
    assert {operation["op"] for operation in operations} == {"add", "remove", "replace"}
    assert all("same" not in operation["path"] for operation in operations)
    assert _patched(before, operations) == after


def test_an_overlay_cannot_add_objects() -> None:
    base = run_documents(EXAMPLE, None)
    with pytest.raises(ValueError, match="not which there are"):
        overlays.kustomization(base, base[1:], "../base")


def _build(directory: Path, patched: bool = True) -> list[Document]:
    """What `kubectl kustomize` does with our kustomizations: resources, then JSON patches."""
    content = yaml.safe_load((directory / "kustomization.yaml").read_text())
    documents: list[Document] = []
    for resource in content["resources"]:
        path = directory / resource
        documents += _build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in content.get("patches", ()) if patched else ():
        wanted = (patch["target"]["kind"], patch["target"]["name"])
        operations = yaml.safe_load(patch["patch"])
        documents = [_patched(document, operations) if key(document) == wanted else document for document in documents]
    return documents


def _patched(value: Any, operations: list[dict[str, Any]]) -> Any:
    value = json.loads(json.dumps(value))
    for operation in operations:
        *places, last = [p.replace("~1", "/").replace("~0", "~") for p in operation["path"].split("/")[1:]]
        at = value
        for place in places:
            at = at[int(place) if isinstance(at, list) else place]
        name: Any = int(last) if isinstance(at, list) else last
        if operation["op"] == "remove":
            del at[name]
        else:
            assert operation["op"] == "add" or name in at or isinstance(at, list)
            at[name] = operation["value"]
    return value


def _by_key(documents: list[Document]) -> dict[tuple[str, str], Document]:
    return {key(document): document for document in documents}
