"""What the repository promises in its files: launch files, README, records, start-up cost."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distrobust import config
from distrobust.federated import settings
from distrobust.metrics.table import TABLE
from tests.harness.markdown import known_commands, named_commands

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "benchmarks/README.md"]
README, EVIDENCE = (path.read_text() for path in READMES)
RECORDS = sorted((ROOT / "benchmarks/results").glob("*.json"))


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_every_launch_file_is_a_valid_configuration(path: Path) -> None:
    if path.name.startswith("federated-"):
        simulated = settings.load(path)
        assert settings.parse(yaml.safe_load(config.dump(simulated)), "again") == simulated
        return
    loaded = config.load(path)
    assert config.parse(yaml.safe_load(config.dump(loaded)), "again") == loaded


def test_importing_the_package_imports_neither_ray_nor_prometheus_nor_torch() -> None:
    heavy = ("ray", "prometheus_client", "torch", "matplotlib")
    code = f"import distrobust, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_every_file_and_heading_a_readme_points_to_exists(readme: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", readme.read_text()) if "://" not in link]
    assert links
    for path, _, heading in (link.partition("#") for link in links):
        target = readme.parent / path if path else readme
        assert target.exists(), f"{path} in {readme}"
        assert not heading or heading in _anchors(target.read_text()), f"{path}#{heading} in {readme}"


def _anchors(text: str) -> list[str]:
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_make_target_the_readme_names_exists() -> None:
    targets = set(re.findall(r"`?make ([a-z]+)", README))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= targets
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


def test_every_command_the_readmes_name_exists() -> None:
    assert {"train", "evaluate", "report", "config", "k8s render", "bench step"} <= named_commands(README)
    assert "bench crossover" in named_commands(EVIDENCE)
    assert named_commands(README) | named_commands(EVIDENCE) <= known_commands()


def test_every_metric_the_readme_names_is_in_the_table() -> None:
    names = set(re.findall(r"\bdistrobust_[a-z_]+", README))
    assert names <= {metric.name for metric in TABLE}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_every_record_says_how_it_was_made(path: Path) -> None:
    content = json.loads(path.read_text())
    assert {"question", "command", "commit", "versions", "hardware"} <= content.keys()
    assert not content["commit"].endswith("+changes"), "made with uncommitted code"


def test_every_record_is_explained() -> None:
    assert RECORDS
    assert [path.name for path in RECORDS if f"(results/{path.name})" not in EVIDENCE] == []


def test_tables_are_those_of_the_records() -> None:
    ran = subprocess.run([sys.executable, "benchmarks/table.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    printed = [line for line in ran.stdout.splitlines() if line]
    assert len(printed) > 100
    assert [line for line in printed if line not in EVIDENCE] == []
    results = README[README.index("## Results") : README.index("## On Kubernetes")]
    shown = [line for line in results.splitlines() if line.startswith("|")]
    assert shown
    assert [line for line in shown if line not in printed] == []


def test_no_two_test_files_share_a_name() -> None:
    """pytest would import one for both."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
