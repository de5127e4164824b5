"""A real Prometheus scrapes a real exporter; every panel then has something to show, and no alert fires by mistake."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from distrobust.metrics.alerts import JOB, groups
from distrobust.metrics.dashboard import dashboard
from distrobust.metrics.prometheus import Exporter
from tests.metrics.test_prometheus import RECORDS, step

PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: prometheus)")
PANELS = [
    (panel["title"], target["legendFormat"], target["expr"])
    for panel in dashboard()["panels"]
    for target in panel.get("targets", ())
]
LEAVE_OUT = {"checkpoint_failed", "diverged"}  # so that all is well


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has scraped a run of two workers a few times."""
    directory = tmp_path_factory.mktemp("prometheus")
    (directory / "rules.yaml").write_text(json.dumps({"groups": groups()}))
    exporters = [Exporter("digits", rank, port=0, file_sd=directory / "targets") for rank in (0, 1)]
    settings = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {"job_name": JOB, "file_sd_configs": [{"files": [str(directory / "targets/*.json")]}]},
        ],
    }
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    assert PROMETHEUS is not None
    arguments = {"config.file": "prometheus.yaml", "storage.tsdb.path": "data", "web.listen-address": address}
    process = subprocess.Popen(
        [PROMETHEUS, *(f"--{key}={value}" for key, value in arguments.items())],
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _play(exporters, address)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=20)
        for exporter in exporters:
            exporter.close()


def _play(exporters: list[Exporter], address: str) -> None:
    """Records of a run in which all is well, one more step with every look, until Prometheus has seen a few."""
    for record in RECORDS:
        if record["event"] not in LEAVE_OUT:
            for exporter in exporters:
                exporter.write({**record, "time": time.time()})
    number, deadline = 10, time.monotonic() + 40
    while True:
        number += 10
        for exporter in exporters:
            exporter.write(step(number, time=time.time()))
        time.sleep(0.25)
        try:
            seen = _query(address, "min(count_over_time(distrobust_finished_steps[1m])) >= 4")
        except OSError:  # it is still starting
            seen = []
        if seen:
            return
        assert time.monotonic() < deadline, "Prometheus has not scraped"


@pytest.mark.parametrize(("title", "legend", "expression"), PANELS, ids=[f"{t}: {n}" for t, n, _ in PANELS])
def test_every_panel_has_something_to_show(server: str, title: str, legend: str, expression: str) -> None:
    found = _query(server, expression.replace("$run", "digits|other"))
    assert found, title
    for series in found:
        assert all(series["metric"].get(label) for label in _labels(legend)), (legend, series["metric"])
    assert not _query(server, expression.replace("$run", "other"))


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
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://{address}/api/v1/query?{query}", timeout=10) as answer:
        return json.load(answer)["data"]["result"]  # type: ignore[no-any-return]
