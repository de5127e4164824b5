"""The page of a simulation: made from its records alone, also from those of half a simulation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federated.conftest import Simulate, made_up
from federated.test_command import arguments, run
from report.test_report import EVIL, Balance

from distrobust.federated import evaluation, network
from distrobust.federated.partition import Partition
from distrobust.federated.totals import BANDS, by_band
from distrobust.metrics import jsonl
from distrobust.report.run import write_report

DRAWN = (
    *("Accuracy against rounds", "Accuracy against bytes", "Accuracy against time", "Accuracy over clients"),
    *(
        "Clients by accuracy at the end",
        "Bytes",
        "Where clients&#x27; time goes",
        "Clients in a round",
        "Who took part",
    ),
)


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, with robust accuracy."""
    out = tmp_path_factory.mktemp("reported") / f"{EVIL.replace('/', '')}"
    with pytest.MonkeyPatch.context() as patch:
        more = ("rounds.number=12", "evaluate.every=4", "attack.eps=0.05", "attack.steps=1", "clients.per_round=10")
        assert run(patch, *arguments(digits, out, *more)) == 0
    return out


def text_of(directory: Path) -> str:
    return write_report(directory).read_text(encoding="utf-8").replace("\u00a0", " ")


def test_the_command_leaves_a_page_that_loads_nothing_and_says_what_the_records_say(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)|url\((?!#)|@import", text)
    assert "<script" not in text
    for title in DRAWN:
        assert f"<h3>{title}</h3>" in text
    records = jsonl.read(finished / "metrics.jsonl")
    (summary,) = (record for record in records if record["event"] == "summary")
    assert f"{100 * summary['test']['clean']['accuracy']:.1f} % accuracy on the test rows and" in text
    assert summary["test"]["robust"]["attack"] in text
    megabytes = (summary["download_bytes"] + summary["upload_bytes"]) / 1e6
    assert f"% at {megabytes:.3g} MB, both directions" in text
    for name in ("download", "upload", "wasted download", "wasted upload"):
        assert f"{name} {summary[name.replace(' ', '_') + '_bytes'] / 1e6:.3g} MB" in text
    spent = [summary[f"{name}_s"] for name in ("compute", "download", "upload", "wait")]
    assert f"compute {100 * spent[0] / sum(spent):.3g} %, download" in text
    assert f"{summary['lost']:,} of {sum(r.get('started', 0) for r in records):,} updates were lost" in text


def test_half_a_simulation_has_a_page_too(finished: Path, tmp_path: Path) -> None:
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    for number, expected in (
        (1, "No round has ended yet"),
        (3, "nobody has looked"),
        (8, "% accuracy on held-out rows"),
    ):
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:number]))
        text = text_of(tmp_path)
        assert expected in text
        assert "not finished" in text


def test_long_simulations_are_drawn_in_stretches(finished: Path, tmp_path: Path) -> None:
    records = jsonl.read(finished / "metrics.jsonl")
    begun, one = records[0], next(record for record in records if record["event"] == "round")
    writer = jsonl.JsonLines(tmp_path / "metrics.jsonl")
    for record in (begun, *({**one, "round": number} for number in range(5000))):
        writer.write(record)
    writer.close()
    assert len(text_of(tmp_path)) < 1_000_000


def test_bands_of_clients_add_up_and_are_equal() -> None:
    for number in (1, 7, BANDS, 1000, 10**6):
        everybody = np.arange(min(number, 1000)) * max(1, number // 1000)
        counts = by_band(everybody, number)
        assert len(counts) == min(number, BANDS)
        assert sum(counts) == len(everybody)
        assert max(counts) - min(counts) <= 1
        assert sum(by_band(everybody[:0], number)) == 0


def test_a_clients_accuracy_is_that_on_rows_of_its_own_classes(simulate: Simulate) -> None:
    """By class share, against counting over rows that repeat the client's classes."""
    data = made_up()
    simulation = simulate(data, clients={"registered": 9, "per_round": 3, "partition": "shards"})
    for _ in range(3):
        simulation.step()
    found = simulation.accuracies(data.held_out)["clean"]
    own = evaluation.of_clients(found, simulation.class_shares())
    model = network.load_(simulation.module, simulation.shared)
    with torch.no_grad():
        right = (model(data.held_out.images.float() / 255).argmax(1) == data.held_out.labels).double()
    for client in range(9):
        classes = simulation.labels[torch.from_numpy(simulation.partition.rows_of(client))]
        expected = np.mean([float(right[data.held_out.labels == label].mean()) for label in classes])
        assert own[client] == pytest.approx(expected)
    assert own.std() > 0.01


def test_classes_that_were_never_tested_are_left_out(simulate: Simulate) -> None:
    found: Any = simulate().accuracies(made_up().held_out)["clean"]
    shares = np.array([[0.5, 0.5, 0, 0], [0, 1.0, 0, 0]])
    own = evaluation.of_clients(
        found.__class__(**{**vars(found), "class_samples": (10, 0), "class_correct": (7, 0)}), shares
    )
    assert own[0] == pytest.approx(0.7)
    assert np.isnan(own[1])
    assert sum(evaluation.histogram(own)) == 1


def test_many_clients_are_sampled() -> None:
    labels = np.arange(50) % 5
    shares = evaluation.class_shares(Partition(10**6, lambda client: np.array([client % 50])), labels, 5, 0)
    assert 0.9 * evaluation.SAMPLE < len(shares) <= evaluation.SAMPLE
    # 1,000 clients of one class each: a share of 1/5 is known to 0.013
    assert shares.mean(0) == pytest.approx(np.full(5, 0.2), abs=0.05)
