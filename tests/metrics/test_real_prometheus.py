"""A real Prometheus, set up as k8s/monitoring says, scrapes a run of two workers and a simulation to their ends.

Every query of every panel then has something to show, and no alert has fired by mistake.
"""

import json
import math
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from distrobust.metrics.alerts import groups
from distrobust.metrics.dashboard import dashboard
from distrobust.metrics.table import TABLE
from tests.train.conftest import write_stripes

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
pytestmark = [
    pytest.mark.prometheus,
    pytest.mark.timeout(180),
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: prometheus)"),
]
MONITORING = Path(__file__).parents[2] / "k8s/monitoring"
RUNS = ("watched", "simulated")
PANELS = [
    (panel["title"], target["legendFormat"], target["expr"])
    for panel in dashboard()["panels"]
    for target in panel.get("targets", ())
]
ROUNDS = 1500
LINGER_S = 60  # the exporters stay until the tests are over and end the run


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has watched both, whose exporters still answer."""
    directory = tmp_path_factory.mktemp("watched")
    data = write_stripes(directory / "data", num_train=320)
    job = ("train", str(_job_file(directory, data)), "--launcher", "torchrun")
    simulation = ("simulate", str(_simulation_file(directory, data)))
    with _prometheus(directory) as address, _started(*job) as training, _started(*simulation) as simulating:
        of_run = 'count(distrobust_evaluation_accuracy_ratio{model="fine-tuned", attack!="clean"}) == 2'
        _wait_for(of_run, address, training)
        _wait_for(f"distrobust_federated_finished_rounds == {ROUNDS}", address, simulating)
        yield address


def _job_file(directory: Path, data: Path) -> Path:
    """Pre-training, fine-tuning and the final evaluation, with everything on that has a metric."""
    values = {
        "run": {"dir": str(directory / "runs/watched")},
        "cluster": {"workers": 2, "timeout_s": 60},
        "data": {"path": str(data), "held_out": 0.2},
        "model": {"name": "cnn"},
        "pretrain": {"epochs": 16, "batch_size": 32},  # so that Prometheus sees it at work
        "train": {"epochs": 8, "batch_size": 32},
        "attack": {"name": "pgd", "steps": 3, "eps": 0.05},
        "compress": {"density": 0.02, "warmup": 0.1},
        "noise": {},
        "checkpoint": {"every": 4},
        "metrics": {"every": 2, "port": 0, "linger_s": LINGER_S},
    }
    return _written(directory / "job.yaml", values)


def _simulation_file(directory: Path, data: Path) -> Path:
    values = {
        "run": {"dir": str(directory / "runs/simulated")},
        "data": {"path": str(data), "held_out": 0.2},
        "clients": {"registered": 20, "per_round": 10, "rows": 32},
        "attack": {"steps": 3, "eps": 0.05},
        "upload": {"density": 0.05},
        "rounds": {"number": ROUNDS, "over_selection": 0.2},
        "evaluate": {"every": 10},
        "metrics": {"port": 0, "linger_s": LINGER_S},
    }
    return _written(directory / "simulation.yaml", values)


def _written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@contextmanager
def _started(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A command of distrobust, ended after the block."""
    command = [sys.executable, "-m", "distrobust", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=30)


@contextmanager
def _prometheus(directory: Path) -> Iterator[str]:
    """With the configuration and the rules of k8s/monitoring, looking more often and for this directory's runs."""
    shutil.copy(MONITORING / "rules.yaml", directory)
    settings = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    settings["global"] = {"scrape_interval": "250ms", "evaluation_interval": "250ms"}
    [discovery] = settings["scrape_configs"][0]["file_sd_configs"]
    [files] = discovery["files"]
    discovery["files"] = [files.replace("/shared/runs/digits", f"{directory}/runs/{run}") for run in RUNS]
    discovery["refresh_interval"] = "250ms"
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    assert PROMETHEUS is not None
    options = {
        "config.file": "prometheus.yaml",
        "storage.tsdb.path": "data-of-prometheus",
        "web.listen-address": address,
    }
    process = subprocess.Popen(
        [PROMETHEUS, *(f"--{key}={value}" for key, value in options.items())],
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait_for(expression: str, address: str, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not _query(address, expression):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{expression}: {process.communicate()[0]}")
        time.sleep(0.25)


@pytest.mark.parametrize(("title", "legend", "expression"), PANELS, ids=[f"{t}: {n}" for t, n, _ in PANELS])
def test_every_panel_has_something_to_show(server: str, title: str, legend: str, expression: str) -> None:
    found = _query(server, expression.replace("$run", "watched|simulated|other"))
    assert found, title
    for series in found:
        assert all(series["metric"].get(label) for label in _labels(legend)), (legend, series["metric"])
        assert math.isfinite(float(series["value"][1])), series
    assert not _query(server, expression.replace("$run", "other"))


def test_the_crossover_is_where_the_counted_bytes_and_seconds_put_it(server: str) -> None:
    def of_phase(title: str, legend: str) -> dict[str, float]:
        [expression] = [e for t, n, e in PANELS if t.startswith(title) and n.endswith(legend)]
        found = _query(server, expression.replace("$run", "watched"))
        return {series["metric"]["phase"]: float(series["value"][1]) for series in found}

    link = of_phase("Crossover", "phase}}")
    assert link["pretrain"] == 0  # dense
    assert link["train"] > 0
    even, density = of_phase("Density", "dense sends less"), of_phase("Density", "phase}}")
    assert density["pretrain"] == 1
    assert even["pretrain"] > 0.9  # records and scores are sent too, and weigh something beside so small a model
    assert density["train"] < even["train"] <= 1


def test_both_workers_were_scraped_long_before_the_end(server: str) -> None:
    finished = 'distrobust_finished_steps{phase="train"} == distrobust_planned_steps'
    assert {series["metric"]["rank"] for series in _query(server, finished)} == {"0", "1"}
    [up] = _query(server, 'count(up{job="distrobust"} == 1)')
    assert up["value"][1] == "3"
    early = 'min_over_time(distrobust_finished_steps{phase="train"}[5m]) < distrobust_planned_steps / 2'
    assert len(_query(server, early)) == 2


def test_what_a_worker_serves_has_no_fault_promtool_knows(server: str) -> None:
    assert PROMTOOL is not None
    addresses = {series["metric"]["instance"] for series in _query(server, "up")}
    assert len(addresses) == 3
    for address in addresses:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            served = answer.read()
        ran = subprocess.run([PROMTOOL, "check", "metrics"], input=served, capture_output=True, timeout=60)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        names = {line.split()[2] for line in served.decode().splitlines() if line.startswith("# TYPE ")}
        assert {metric.name for metric in TABLE} <= names


def test_no_alert_fires_while_all_is_well(server: str) -> None:
    with urllib.request.urlopen(f"http://{server}/api/v1/rules", timeout=10) as answer:
        [group] = json.load(answer)["data"]["groups"]
    assert {rule["name"]: rule["state"] for rule in group["rules"]} == {
        rule["alert"]: "inactive" for rule in groups()[0]["rules"]
    }
    assert all(rule["health"] == "ok" for rule in group["rules"])


def _labels(legend: str) -> list[str]:
    return [part.split("}}")[0] for part in legend.split("{{")[1:]]


def _query(address: str, expression: str) -> list[dict[str, Any]]:
    """Empty also while Prometheus is still starting."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
    except urllib.error.URLError:
        pass
    return []
