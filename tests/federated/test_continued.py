"""A simulation that was stopped goes on to the bit, every client's state included."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from federated.conftest import Simulate
from federated.test_command import arguments, run
from federated.test_laws import CODED, ROUGH, SOME, everything

from distrobust.errors import CheckpointError, ConfigError
from distrobust.federated import checkpoint
from distrobust.federated.simulate import Simulation
from distrobust.metrics import jsonl

KINDS: list[dict[str, Any]] = [
    {**CODED, "upload": {**CODED["upload"], "momentum": 0.5}, "availability": {"name": "markov"}},
    {"local": {"control_variates": True}, "server": {"optimizer": "momentum"}},
    {"server": {"optimizer": "adam", "rate": 0.01}, "attack": {"steps": 1}},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_stopping_and_continuing_changes_nothing(simulate: Simulate, tmp_path: Path, kind: dict[str, Any]) -> None:
    whole, first, second = (simulate(clients=SOME, **ROUGH, **kind) for _ in range(3))
    expected = [whole.step() for _ in range(7)]
    assert not checkpoint.load(first, tmp_path)
    for _ in range(4):
        first.step()
    checkpoint.save(first, tmp_path)
    assert checkpoint.load(second, tmp_path)
    records = [second.step() for _ in range(3)]
    timed = {"time", "host_s"}
    for ours, theirs in zip(records, expected[4:], strict=True):
        assert {k: v for k, v in ours.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}
    assert all(torch.equal(a, b) for a, b in zip(everything(whole), everything(second), strict=True))
    assert second.totals == whole.totals


def test_another_configuration_and_a_damaged_file_are_refused(simulate: Simulate, tmp_path: Path) -> None:
    checkpoint.save(simulate(clients=SOME), tmp_path)
    assert checkpoint.load(simulate(clients=SOME, execute={"cohort": 3}), tmp_path)
    with pytest.raises(ConfigError, match=r"another configuration \(clients.alpha: 0.7 here, 0.5 there\)"):
        checkpoint.load(simulate(clients={**SOME, "alpha": 0.7}), tmp_path)
    path = tmp_path / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: damaged .* delete it to start afresh"):
        checkpoint.load(simulate(clients=SOME), tmp_path)


def test_ctrl_c_finishes_the_round_and_the_same_command_continues(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Simulation.step

    def interrupted(simulation: Simulation) -> dict[str, Any]:
        if simulation.round == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(simulation)

    given = ("rounds.number=12", "clients.per_round=10")
    assert run(monkeypatch, *arguments(digits, tmp_path / "whole", *given)) == 0
    monkeypatch.setattr(Simulation, "step", interrupted)
    assert run(monkeypatch, *arguments(digits, tmp_path / "halves", *given)) == 130
    assert "stopped after round 7, start again to continue" in capsys.readouterr().out
    monkeypatch.setattr(Simulation, "step", step)
    assert run(monkeypatch, *arguments(digits, tmp_path / "halves", *given)) == 0
    assert "continues after round 7" in capsys.readouterr().out
    models = [
        torch.load(tmp_path / one / "models/global.pt", weights_only=True)["state"] for one in ("whole", "halves")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    rounds = [r["round"] for r in jsonl.read(tmp_path / "halves/metrics.jsonl") if r["event"] == "round"]
    assert rounds == list(range(12))
    assert not (tmp_path / "halves" / checkpoint.NAME).exists()
