"""What records become in TensorBoard and in Weights & Biases, read back with their own readers."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distrobust.errors import ConfigError
from distrobust.metrics import tensorboard
from distrobust.metrics.scalars import EVENTS, scalars
from distrobust.metrics.table import TABLE
from tests.harness.jobs import run_job
from tests.metrics.test_prometheus import RECORDS, step
from tests.train.conftest import MakeConfig

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs pip install 'distrobust[tensorboard]'"
)
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="needs pip install 'distrobust[wandb]'"
)


def test_every_number_of_the_table_that_changes_has_a_curve_of_its_own() -> None:
    names = [name for record in RECORDS for name in scalars(record)]
    assert len(set(names)) == len(names)
    rows = {f"{m.event}/{m.name.removeprefix('distrobust_')}" for m in TABLE if m.event in EVENTS and m.field != "time"}
    assert {"/".join(name.split("/")[:2]) for name in names} == rows


def test_groups_attacks_and_models_are_told_apart_and_what_is_no_number_is_left_out() -> None:
    found = scalars(step(loss=float("nan"), accuracy=None, layer_lr_ratio={"stem": 0.9, "head": float("inf")}))
    assert found["step/layer_lr_ratio/stem"] == 0.9
    assert not {"step/layer_lr_ratio/head", "step/train_loss", "step/train_accuracy_ratio"} & found.keys()
    assert scalars(RECORDS[4])["epoch/robust_accuracy_ratio/PGD"] == 0.3
    [evaluation] = [record for record in RECORDS if record["event"] == "evaluation"]
    assert scalars(evaluation)["evaluation/evaluation_accuracy_ratio/fine-tuned/PGD"] == 0.3
    assert scalars({"event": "notice", "text": "a"}) == scalars({"event": "unheard of"}) == {}


@pytest.mark.parametrize(("library", "setting"), [("tensorboard", "true"), ("wandb", "digits")])
def test_what_is_not_installed_is_one_clear_line(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, library: str, setting: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wanted = (
        rf"^metrics\.{library}: got {setting}, but {library} is not installed; pip install 'distrobust\[{library}\]'"
    )
    with pytest.raises(ConfigError, match=wanted):
        run_job(make_config(f"metrics.{library}={setting}"))


@needs_tensorboard
def test_tensorboard_shows_each_phase_by_itself(tmp_path: Path) -> None:
    sink = tensorboard.TensorBoard(tmp_path)
    for record in [*RECORDS, step(20, phase="pretrain", loss=0.5)]:
        sink.write({"time": 1e9, **record})
    sink.close()
    sink.close()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "train", "pretrain", "evaluation"}
    assert _curve(tmp_path / "train", "step/train_loss") == [(10, 1.5)]
    assert _curve(tmp_path / "pretrain", "step/train_loss") == [(20, 0.5)]
    assert _curve(tmp_path / "train", "step/layer_lr_ratio/head") == [(10, pytest.approx(1.1))]
    assert _curve(tmp_path / "evaluation", "evaluation/evaluation_accuracy_ratio/fine-tuned/PGD")


@needs_tensorboard
def test_steps_taken_again_after_a_restart_replace_those_of_before(tmp_path: Path) -> None:
    start = {"event": "run", "resumed_phase": None, "resumed_step": 0}
    for resumed, losses in (
        (start, {10: 1.0, 20: 2.0, 30: 3.0}),
        ({**start, "resumed_phase": "train", "resumed_step": 10}, {20: 4.0}),
    ):
        sink = tensorboard.TensorBoard(tmp_path)
        sink.write(resumed)
        for number, loss in losses.items():
            sink.write(step(number, loss=loss))
        sink.close()
    assert _curve(tmp_path / "train", "step/train_loss") == [(10, 1.0), (20, 4.0)]


@needs_tensorboard
def test_a_run_leaves_its_curves_on_request(make_config: MakeConfig) -> None:
    config = make_config("metrics.tensorboard=true")
    run_job(config)
    assert [number for number, _ in _curve(config.run.dir / "tensorboard/train", "step/train_loss")] == [2, 4, 6, 8]


@needs_wandb
@pytest.mark.procs
def test_weights_and_biases_keeps_a_run_offline_whatever_the_environment_says(tmp_path: Path) -> None:
    """In a process of its own: wandb starts others, and warns on import."""
    code = (
        "import json, pathlib, sys\n"
        "from distrobust.metrics.weights_and_biases import WeightsAndBiases\n"
        "directory = pathlib.Path(sys.argv[1])\n"
        "sink = WeightsAndBiases('adversarial', directory)\n"
        "[sink.write(record) for record in json.load(sys.stdin)]\n"
        "sink.close(); sink.close()"
    )
    secret = "0123456789abcdef" * 2 + "01234567"
    surroundings = {"WANDB_MODE": "online", "WANDB_DIR": str(tmp_path / "elsewhere"), "WANDB_API_KEY": secret}
    run = tmp_path / "digits"
    run.mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        input=json.dumps([RECORDS[0] | {"config": {"train": {"epochs": 3}}}, *RECORDS[1:], step(20, loss=0.25)]),
        env={**os.environ, **surroundings},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ran.stderr == ""
    [kept] = (run / "wandb").glob("offline-run-*/*.wandb")
    assert not (tmp_path / "elsewhere").exists()
    config, history, summary = _read(kept)
    assert config["train"] == {"epochs": 3}
    losses = {row["train/step"]: row["train/step/train_loss"] for row in history if "train/step/train_loss" in row}
    assert losses == {10: 1.5, 20: 0.25}
    assert summary["evaluation/evaluation_accuracy_ratio/fine-tuned/PGD"] == 0.3
    for path in run.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path


def _curve(directory: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Configuration, rows and summary of a run of wandb's, from the log it would send."""
    from wandb.proto import wandb_internal_pb2

    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}

    def values(items: Any) -> dict[str, Any]:
        return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}

    for data in _log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        config |= values(record.run.config.update) | values(record.config.update)
        history += [values(record.history.item)] if record.history.item else []
        summary |= values(record.summary.update)
    return config, history, summary


def _log_records(log: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, in which wandb writes: blocks of 32 KiB, 7 bytes before each piece of a record."""
    at, pieces = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        pieces += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""
