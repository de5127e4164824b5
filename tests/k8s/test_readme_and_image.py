"""What k8s/README.md tells people to type exists, and the image has what the manifests take for granted."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from distrobust import __version__, config
from distrobust.k8s import inside, overlays
from distrobust.metrics.alerts import ALERTS
from tests.harness.markdown import known_commands, named_commands
from tests.k8s.rendered import EXAMPLE, K8S, ROOT, of_kind, run_documents, templates, the

README = (K8S / "README.md").read_text()
DOCKERFILE = (K8S / "Dockerfile").read_text()
IGNORED = (K8S / "Dockerfile.dockerignore").read_text()
SETTINGS = re.findall(r"--set ([^\s`]+=[^\s`]+)", README)


def test_every_file_and_directory_it_names_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    directories = re.findall(r"-k (k8s/[a-z/-]+)", README)
    assert len(links) > 10
    assert len(directories) > 3
    assert [link for link in links if not (K8S / link).exists()] == []
    assert [path for path in directories if not (ROOT / path / "kustomization.yaml").exists()] == []


def test_every_command_it_names_exists() -> None:
    named = named_commands(README)
    assert {"k8s render", "k8s write", "data digits", "evaluate", "config"} <= named
    assert named <= known_commands()
    assert set(re.findall(r"--overlay ([a-z]+)", README)) <= set(overlays.OVERLAYS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_it_names_is_accepted(setting: str) -> None:
    more = {
        "model.name=huggingface": ["model.directory=x"],
        "model.directory=DIR": ["model.name=huggingface"],
        "compress.fewer_bytes=null": ["compress.exchange_s=0.05"],
        "compress.exchange_s=0.05": ["compress.fewer_bytes=null"],
    }
    config.load(EXAMPLE, [setting, *more.get(setting, [])])


def test_settings_are_found_at_all() -> None:
    assert len(SETTINGS) > 12


def test_its_objects_are_those_of_the_manifest() -> None:
    documents = run_documents(EXAMPLE, "cpu")
    names = {("rayjob", the(documents, "RayJob")["metadata"]["name"]), ("rayjob", "cifar10"), ("job", "digits")}
    assert set(re.findall(r"\b(rayjob|job)/([a-z0-9-]+)", README)) <= names
    run_dir = inside.inside(config.load(EXAMPLE)).run.dir
    assert f"cat {run_dir}/report.html" in README
    assert f"data digits {inside.inside(config.load(EXAMPLE)).data.path}" in README
    assert "deployment/distrobust-files" in README


def test_every_alert_is_explained() -> None:
    assert set(re.findall(r"^\| (Distrobust\w+) \|", README, re.MULTILINE)) == {alert.name for alert in ALERTS}


def test_the_image_has_the_name_the_manifests_use() -> None:
    for overlay in overlays.OVERLAYS:
        device = "cuda" if overlay == "gpu" else "cpu"
        tag = f"distrobust:{__version__}-{device}"
        assert {c["image"] for t in templates(run_documents(EXAMPLE, overlay)) for c in t["spec"]["containers"]} == {
            tag
        }
        assert f"--build-arg DEVICE={device} -t {tag} ." in DOCKERFILE
        assert tag in README


def test_the_image_runs_as_the_user_the_manifests_name() -> None:
    security = next(templates(run_documents(EXAMPLE, None)))["spec"]["securityContext"]
    user, group = security["runAsUser"], security["runAsGroup"]
    assert f"\nUSER {user}:{group}\n" in DOCKERFILE
    assert f"useradd --uid {user} --gid {group}" in DOCKERFILE
    assert "HOME=/tmp" in DOCKERFILE


def test_the_image_holds_what_probes_and_compression_need() -> None:
    [installed] = re.findall(r"apt-get install \S+ \S+ (.+?) \\", DOCKERFILE)
    assert {"wget", "gcc", "libc6-dev"} <= set(installed.split())  # KubeRay's probes call wget


def test_what_the_image_is_built_from_exists_and_is_not_ignored() -> None:
    copied = [s for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for s in shlex.split(line)[:-1]]
    kept = {line.removeprefix("!") for line in IGNORED.splitlines() if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)
    assert set(copied) == kept
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [extras] = re.findall(r"'\.\[([a-z,]+)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert {"cluster", "demo"} <= set(extras.split(","))  # job submission and Ray's metrics; digits and reports
    assert (ROOT / project["readme"]).name in copied


def test_no_version_is_pinned_twice() -> None:
    assert not re.search(r"(torch|ray)==\d", DOCKERFILE)
    assert not of_kind(run_documents(EXAMPLE, None), "Secret")


def test_the_package_takes_no_k8s_directory_along() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert tool["packages"] == ["distrobust"]
    assert (Path(ROOT) / "distrobust/k8s/run.py").exists()
