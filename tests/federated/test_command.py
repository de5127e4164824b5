"""`distrobust simulate` on real data, its records, and what it answers to mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from federated.conftest import Simulate, made_up
from harness.texts import write_texts

from distrobust import cli
from distrobust.errors import ConfigError, DivergedError, ModelError
from distrobust.federated import network, settings
from distrobust.federated.patience import PATIENCE
from distrobust.federated.rows import Rows
from distrobust.metrics import jsonl
from distrobust.models import build

FILE = Path(__file__).parents[2] / "launch/federated-digits.yaml"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["distrobust", "simulate", *arguments])
    try:
        cli.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def arguments(digits: Path, out: Path, *more: str) -> list[str]:
    values = [f"data.path={digits}", f"run.dir={out}", *more]
    return [str(FILE), *(part for value in values for part in ("--set", value))]


def test_the_launch_file_learns_digits_and_leaves_records(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, *arguments(digits, out, "rounds.number=30")) == 0
    text = capsys.readouterr().out
    assert "1,000 clients, 50 a round, dirichlet; mlp of 9,610 parameters" in text
    records = jsonl.read(out / "metrics.jsonl")
    rounds = [record for record in records if record["event"] == "round"]
    (summary,) = [record for record in records if record["event"] == "summary"]
    assert [record["round"] for record in rounds] == list(range(30))
    assert all(sum(record["took_part"]) == record["updates"] for record in rounds)
    accuracy = summary["test"]["clean"]["accuracy"]
    assert accuracy > 0.8
    assert f"clean {accuracy:.1%}" in text
    for name in ("download_bytes", "upload_bytes", "updates", "lost", "surplus", "late"):
        assert sum(record[name] for record in rounds) == summary[name]
    assert summary["upload_bytes"] < 0.05 * 4 * 9610 * sum(record["started"] for record in rounds)
    assert 0 < summary["wasted_upload_bytes"] < summary["upload_bytes"]
    assert settings.load(out / "config.yaml").rounds.number == 30
    saved = torch.load(out / "models/global.pt", weights_only=True)
    assert saved["model"] == "mlp"
    assert not (out / "scratch").exists()
    assert run(monkeypatch, *arguments(digits, out, "rounds.number=30")) == 0
    again = jsonl.read(out / "metrics.jsonl")
    timed = {"time", "host_s", "updates_per_s", "test"}  # which holds seconds too
    strip = [[{key: v for key, v in one.items() if key not in timed} for one in each] for each in (records, again)]
    assert json.dumps(strip[0]) == json.dumps(strip[1])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clients.per_round=2000", "clients: per_round is 2000 of 1000 registered clients; wanted at most as many"),
        ("clients.rows=null", "leaves "),
        ("clients.partition=group", "column goes with partition group or client"),
        ("clients.partitoin=iid", "unknown key 'clients.partitoin'; did you mean 'partition'"),
        ("local.control_variates=true", "local.control_variates and download exclude each other"),
        ("model=cnn", "model: wanted 'mlp', 'linear' or 'cnn_gn', got 'cnn'"),
        ("rounds.deadline_s=0", "rounds.deadline_s: wanted greater than 0, got 0"),
        ("rounds.deadline_s=0.001", "rounds.deadline_s: got 0.001, which none of 1,000 clients can meet; wanted more"),
        ("links.drop_out=1", "every client was lost in its upload; lower links.drop_out"),
        ("links.traces=nowhere.csv", "nowhere.csv: cannot be read"),
        ("data.path=nowhere", "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    assert run(monkeypatch, *arguments(digits, tmp_path / "run", override)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_config_prints_what_simulate_will_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distrobust", "config", str(FILE), "--set", "clients.alpha=0.25"])
    cli.main()
    text = capsys.readouterr().out
    assert "alpha: 0.25" in text
    assert "tau: 0.001" in text


def test_clients_may_be_the_values_of_a_column(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        table = pq.read_table(digits / f"{split}.parquet")
        writers = pa.array([f"writer {i % 13}" for i in range(len(table))])
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table.append_column("writer", writers), tmp_path / f"data/{split}.parquet")
    more = ("clients.partition=client", "clients.column=writer", "clients.registered=null", "clients.rows=null")
    given = arguments(tmp_path / "data", tmp_path / "run", *more, "clients.per_round=5", "rounds.number=3")
    assert run(monkeypatch, *given) == 0
    assert "13 clients, 5 a round, client; mlp" in capsys.readouterr().out


def test_the_directory_of_a_training_run_is_left_alone(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert run(monkeypatch, *arguments(digits, tmp_path)) == 2
    assert not (tmp_path / "config.yaml").exists()


def test_a_training_run_leaves_the_directory_of_a_simulation_alone(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments(digits, tmp_path / "run", "rounds.number=2")) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    sets = ("--set", f"data.path={digits}", "--set", f"run.dir={tmp_path / 'run'}")
    job = [str(FILE.with_name("digits.yaml")), "--launcher", "local", "--set", "cluster.workers=1"]
    monkeypatch.setattr(sys, "argv", ["distrobust", "train", *job, *sets])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "holds a run of `distrobust simulate`; set run.dir to another directory" in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("upload", [None, {"density": 0.1}])
def test_an_update_that_is_not_finite_is_excluded_and_counted(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, upload: dict[str, Any] | None
) -> None:
    """As though that client had not been chosen, but for its bytes."""
    from distrobust.federated import local

    data = made_up()
    one = simulate(data, clients={"registered": 6, "per_round": 6}, upload=upload)
    train = local.train

    def broken(*given: Any) -> local.Trained:
        trained = train(*given)
        trained.updates[2, 5] = float("nan")
        return trained

    monkeypatch.setitem(local.EXECUTORS, "batched", broken)
    for _ in range(3):
        record = one.step()
        assert (record["updates"], record["nonfinite"]) == (5, 1)
    assert torch.isfinite(one.shared).all()
    assert not one.residuals.read([2]).any()
    assert one.totals.nonfinite == 3
    assert one.totals.wasted_upload_bytes == one.totals.upload_bytes // 6


def test_nothing_but_nan_ends_with_a_reason(simulate: Simulate) -> None:
    simulation = simulate(clients={"registered": 4, "per_round": 2}, local={"rate": 1e38, "steps": 5})
    for _ in range(PATIENCE - 1):
        simulation.step()
    with pytest.raises(DivergedError, match=r"all that arrived were not finite; lower local\.rate"):
        simulation.step()


def test_fewer_clients_than_wanted_are_taken_as_they_are_and_counted(simulate: Simulate) -> None:
    simulation = simulate(clients={"registered": 20, "per_round": 15}, availability={"name": "bernoulli", "share": 0.4})
    started = [simulation.step()["started"] for _ in range(10)]
    assert 0 < min(started) < 15
    assert simulation.totals.short_rounds == sum(count < 15 for count in started) > 5


def test_nobody_to_be_reached_ends_with_a_reason(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = simulate(clients={"registered": 2, "per_round": 1}, availability={"name": "bernoulli", "share": 1e-9})
    monkeypatch.setattr("distrobust.federated.patience.NOBODY", 30)
    for _ in range(29):
        simulation.step()
    assert simulation.clock_s == 29 * 60.0
    with pytest.raises(DivergedError, match="no update for 30 rounds in a row: no client could be reached"):
        simulation.step()


def test_batch_norm_is_refused_by_name() -> None:
    net = build("cnn", 4, (1, 8, 8), [0.5], [0.25])
    with pytest.raises(ModelError, match=r"layer 'stem.norm' is BatchNorm2d, whose running statistics .* cnn_gn"):
        network.network(net)


def test_a_million_registered_clients_cost_what_the_cohort_costs(simulate: Simulate) -> None:
    simulation = simulate(clients={"registered": 1_000_000, "per_round": 20, "rows": 30, "partition": "dirichlet"})
    for _ in range(3):
        assert simulation.step()["updates"] == 20
    assert len(simulation.last_seen) <= 60


def test_what_clients_keep_goes_to_disk_and_back_when_it_outgrows_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small, large = (Rows(1_000_000, limit, tmp_path / f"{limit}.f32") for limit in (2**25, 2**40))
    for _ in range(12):
        clients = rng.choice(30, 3, replace=False).tolist()
        values = torch.from_numpy(rng.standard_normal((3, 1_000_000), dtype=np.float32))
        for one in (small, large):
            one.write(clients, values)
    assert (small.is_on_disk, large.is_on_disk) == (True, False)
    assert torch.equal(small.read(range(30)), large.read(range(30)))
    assert len(small) == len(large) > 15
    small.close()
    assert list(tmp_path.iterdir()) == []


def test_settings_that_exclude_each_other_say_so() -> None:
    for section, message in (
        ({"local": {"control_variates": True, "momentum": 0.5}}, "control_variates reads mean gradients"),
        ({"local": {"optimizer": "adamw", "momentum": 0.5}}, "momentum goes with optimizer sgd"),
        ({"upload": {"momentum": 0.9, "residual": False}}, "momentum needs residual true"),
        ({"clients": {"registered": None}}, "registered may be null with partition client only"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings.parse({"data": {"path": "x"}, **section}, "test")


def test_texts_are_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_texts(tmp_path / "texts")
    assert run(monkeypatch, *arguments(texts, tmp_path / "run")) == 2
    assert "holds texts; simulated clients train on images" in capsys.readouterr().err
