"""What Prometheus sees of a simulation is what its records say."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from federated.conftest import Simulate, made_up
from federated.test_command import arguments, run
from prometheus_client.parser import text_string_to_metric_families

from distrobust.federated import command, rounds
from distrobust.federated.served import Served
from distrobust.federated.settings import SimulatedMetricsConfig

ANY = SimulatedMetricsConfig(port=0)


def scrape(served: Served) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{served.address}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name.removeprefix("distrobust_federated_"): sample.value for sample in samples}


def test_counters_are_the_totals_and_gauges_the_newest_record(simulate: Simulate, tmp_path: Path) -> None:
    simulation = simulate(
        clients={"registered": 12, "per_round": 5},
        links={"drop_out": 0.3},
        rounds={"number": 8, "over_selection": 0.4, "deadline_s": 2.0},
        evaluate={"every": 4},
    )
    served = Served(tmp_path, ANY)
    try:
        served.write(command.begun(simulation))
        before = scrape(served)
        assert (before["planned_rounds"], before["finished_rounds"], before["lost_updates_total"]) == (8, 0, 0)
        records = []
        rounds.run(
            simulation,
            made_up().held_out,
            lambda r: (records.append(r), served.write(r))[1],
            lambda: None,
            lambda: False,
        )
        found = scrape(served)
    finally:
        served.close()
    totals = simulation.totals
    for name in ("updates", "late_updates", "surplus_updates", "lost_updates", "nonfinite_updates"):
        assert found[f"{name}_total"] == getattr(totals, name.removesuffix("_updates"))
    assert totals.lost > 0
    for kind in ("download", "upload"):
        assert found[f"{kind}_bytes_total"] == getattr(totals, f"{kind}_bytes")
        assert found[f"wasted_{kind}_bytes_total"] == getattr(totals, f"wasted_{kind}_bytes") > 0
    for kind in ("download", "compute", "upload", "wait"):
        assert found[f"{kind}_seconds_total"] == pytest.approx(getattr(totals, f"{kind}_s"))
    assert found["rounds_total"] == found["finished_rounds"] == found["round_seconds_count"] == 8
    assert found["clock_seconds"] == pytest.approx(simulation.clock_s)
    assert found["clean_accuracy_ratio"] == records[-1]["clean"]
    assert found["low_client_accuracy_ratio"] == records[-1]["client_quantiles"][0]


def test_a_continued_simulation_counts_what_this_process_did(simulate: Simulate, tmp_path: Path) -> None:
    simulation = simulate(clients={"registered": 12, "per_round": 5})
    for _ in range(3):
        simulation.step()
    served = Served(tmp_path, ANY)
    try:
        served.write(command.begun(simulation))
        served.write(simulation.step())
        found = scrape(served)
    finally:
        served.close()
    assert (found["updates_total"], found["rounds_total"], found["finished_rounds"]) == (5, 1, 4)
    assert found["distrobust_worker_restarts_total"] == 1


def test_the_command_serves_unless_told_not_to(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    close = Served.close
    monkeypatch.setattr(Served, "close", lambda served: (seen.append(scrape(served)), close(served))[1])
    for port in ("0", "null"):
        given = ("rounds.number=2", "clients.per_round=5", f"metrics.port={port}")
        assert run(monkeypatch, *arguments(digits, tmp_path / port, *given)) == 0
    assert [one["rounds_total"] for one in seen] == [2]
    assert list((tmp_path / "0/prometheus").iterdir()) == []
