"""Stopping, crashing and starting again change nothing about a run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distrobust.errors import CheckpointError, ConfigError, DataError
from distrobust.train import checkpoint, loop
from distrobust.train.checkpoint import Position
from distrobust.train.rundir import RunDirectory
from distrobust.train.state import TrainState
from distrobust.train.step import StepResult, train_step
from tests.harness.jobs import Crash, assert_equal, records_of, run_job, weights_of
from tests.harness.ranks import Rank, run_ranks
from tests.train.conftest import MakeConfig
from tests.train.test_transfer import state_of, step


# 128 training rows, batches of 32: 4 steps of pretrain, 8 of train; checkpoints after every second step
@pytest.mark.parametrize(
    ("phase", "step"), [("pretrain", 1), ("pretrain", 3), ("train", 0), ("train", 5), ("train", 7)]
)
def test_an_interrupted_run_ends_bit_identical_to_an_uninterrupted_one(
    make_config: MakeConfig, crash_at: Any, monkeypatch: pytest.MonkeyPatch, phase: str, step: int
) -> None:
    whole = make_config("run.dir=" + str(make_config().run.dir) + "-whole")
    run_job(whole)
    config = make_config()
    crash_at(phase, step)
    with pytest.raises(Crash):
        run_job(config)
    monkeypatch.undo()
    assert run_job(config).status == "done"
    assert_equal(weights_of(config), weights_of(whole))
    last = [[r for r in records_of(c, "step") if r["phase"] == "train"][-1] for c in (config, whole)]
    for key in ("sent_bytes", "dense_bytes", "loss", "layer_lr_ratio", "layer_noise", "residual_norm_ratio", "samples"):
        assert last[0][key] == last[1][key], key


def test_a_stop_request_writes_a_checkpoint_and_the_next_start_continues(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_config("run.dir=" + str(make_config().run.dir) + "-whole")
    run_job(whole)
    config = make_config("checkpoint.every=100")
    directory = RunDirectory(config.run.dir)

    def stopping(state: TrainState, *rest: Any) -> StepResult:
        if (state.position.phase, state.position.step) == ("train", 1):
            directory.stop.touch()
        return train_step(state, *rest)

    monkeypatch.setattr(loop, "train_step", stopping)
    outcome = run_job(config)
    assert (outcome.status, outcome.text) == ("stopped", "train, step 2 of 8; a checkpoint was written")
    monkeypatch.undo()
    assert run_job(config).status == "done"
    assert_equal(weights_of(config), weights_of(whole))


def test_residuals_survive_a_restart(make_config: MakeConfig, crash_at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    crash_at("train", 5)
    with pytest.raises(Crash):
        run_job(config)
    monkeypatch.undo()
    seen: dict[str, float] = {}

    def looking(state: TrainState, *rest: Any) -> StepResult:
        seen.setdefault("norm", sum(float(r.v.norm()) for r in state.compression.residuals.values()))
        return train_step(state, *rest)

    monkeypatch.setattr(loop, "train_step", looking)
    run_job(config)
    assert seen["norm"] > 0


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    make_config: MakeConfig, crash_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_config("run.dir=" + str(make_config().run.dir) + "-whole")
    run_job(whole)
    config = make_config()
    crash_at("train", 5)
    with pytest.raises(Crash):
        run_job(config)
    monkeypatch.undo()
    newest = config.run.dir / "checkpoints/1-train-0000004/rank-0.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (config.run.dir / "checkpoints/damaged-1-train-0000004/left").mkdir(parents=True)  # not the first time
    run_job(config)
    assert [r["resumed_step"] for r in records_of(config, "run")] == [0, 2]
    (said,) = [r["text"] for r in records_of(config, "notice") if "damaged" in r["text"]]
    assert "1-train-0000004 is damaged (rank-0.pt does not match its digest)" in said
    assert (config.run.dir / "checkpoints/damaged-1-train-0000004").exists()
    assert (config.run.dir / "checkpoints/1-train-0000006").exists()
    assert_equal(weights_of(config), weights_of(whole))


def test_no_whole_checkpoint_is_an_error_and_not_a_fresh_start(
    make_config: MakeConfig, crash_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    crash_at("pretrain", 3)
    with pytest.raises(Crash):
        run_job(config)
    monkeypatch.undo()
    (config.run.dir / "checkpoints/0-pretrain-0000002/manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole"):
        run_job(config)


def test_a_run_directory_of_another_configuration_is_refused(make_config: MakeConfig) -> None:
    config = make_config()
    RunDirectory(config.run.dir).open(config)
    RunDirectory(config.run.dir).checkpoints.mkdir()
    changed = make_config("compress.density=0.1")
    with pytest.raises(
        ConfigError, match=r"belongs to another configuration \(compress.density: 0.1 here, 0.05 there\)"
    ):
        RunDirectory(changed.run.dir).open(changed)


def test_a_first_start_that_failed_binds_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run_job(make_config(f"data.path={tmp_path / 'nowhere'}"))
    assert run_job(make_config()).status == "done"


def test_two_starts_on_one_run_directory_are_refused(make_config: MakeConfig) -> None:
    config = make_config()
    other = pytest.raises(ConfigError, match="is in use by another start")
    with RunDirectory(config.run.dir).held(), other, RunDirectory(config.run.dir).held():
        pass
    with RunDirectory(config.run.dir).held():  # and free again
        pass


def test_checkpoints_come_when_asked_for_and_not_only_with_records(make_config: MakeConfig) -> None:
    config = make_config("checkpoint.every=3", "metrics.every=2", "checkpoint.keep=9", "pretrain=null")
    run_job(config)
    written = [record["step"] for record in records_of(config, "checkpoint")]
    assert written == [3, 4, 6, 8]  # every third, and the ends of both epochs


def test_a_checkpoint_that_cannot_be_written_is_said_and_training_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    config = make_config("checkpoint.backoff_s=0.01")
    assert run_job(config).status == "done"
    notices = [record["text"] for record in records_of(config, "notice")]
    assert notices
    assert all("not written by rank [0]: No space left on device" in text for text in notices)
    counts = [r["failures"] for r in records_of(config, "checkpoint_failed") if r["phase"] == "train"]
    assert counts == list(range(1, len(counts) + 1))
    assert counts


@pytest.mark.ranks
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3)])
def test_what_waits_in_the_residuals_outlives_a_change_of_workers(before: int, after: int) -> None:
    """sum(v) / N and sum(u) / N stay; a value is scaled and rounded once."""

    def first(rank: Rank) -> TrainState:
        state = state_of(rank, None, density=0.05, warmup=0.0)
        for number in range(2):
            step(state, number, rank.rank)
        return state

    states = run_ranks(before, first)
    shared, own = states[0].shared(), [state.own() for state in states]

    def second(rank: Rank) -> TrainState:
        state = state_of(rank, None, density=0.05, warmup=0.0)
        state.load(checkpoint.Loaded(Position(1, "train", 2), shared, own, was_resized=True))
        return state

    resized = run_ranks(after, second)
    assert {state.compression.step for state in resized} == {2}
    for state in resized:
        assert_equal(dict(state.net.named_parameters()), dict(states[0].net.named_parameters()))  # type: ignore[arg-type]
    waiting = 0.0
    for name in states[0].compression.residuals:
        for key in ("u", "v"):
            old, new = (
                sum(getattr(s.compression.residuals[name], key) for s in all_ranks) / len(all_ranks)
                for all_ranks in (states, resized)
            )
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6 * float(old.abs().max()))
            waiting += float(old.abs().sum())
    assert waiting > 0


def test_checkpoints_are_in_order_also_beyond_the_places_of_their_names(tmp_path: Path) -> None:
    names = ["0-pretrain-0000900", "1-train-0000001", "1-train-9999999", "1-train-10000000"]
    for name in [*names, "damaged-1-train-0000002", ".1-train-0000003"]:
        (tmp_path / name).mkdir()
    (tmp_path / "1-train-0000005").write_text("a file")
    assert [path.name for path in checkpoint._in_order(tmp_path)] == names
    checkpoint._prune(tmp_path, keep=2)
    assert [path.name for path in checkpoint._in_order(tmp_path)] == names[-2:]
