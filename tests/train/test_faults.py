"""Faults of storage, and of a rank that is slow or wrong: injected where they happen, said where a person looks."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distrobust.errors import ConfigError
from distrobust.metrics import jsonl
from distrobust.train import faults
from distrobust.train.slow import slow_ranks
from tests.harness.jobs import Crash, assert_equal, records_of, run_job, weights_of
from tests.train.conftest import MakeConfig

# 128 training rows, batches of 32: 8 steps of train, checkpoints after every second
QUICK = ("pretrain=null", "checkpoint.backoff_s=0.01")


def _texts(config: Any) -> list[str]:
    return [record["text"] for record in records_of(config, "notice")]


@pytest.mark.parametrize("kind", ["disk_full", "upload_fails"])
def test_a_file_that_can_be_written_at_the_third_attempt_is_and_the_run_says_so(
    make_config: MakeConfig, kind: str
) -> None:
    whole = make_config("run.dir=" + str(make_config().run.dir) + "-whole", *QUICK)
    run_job(whole)
    config = make_config(*QUICK, f"faults=[{{kind: {kind}, rank: 0, step: 3, times: 2}}]")
    assert run_job(config).status == "done"
    assert "checkpoint 1-train-0000004: written, rank 0's at attempt 3" in _texts(config)
    assert not records_of(config, "checkpoint_failed")
    assert [r["step"] for r in records_of(config, "checkpoint")] == [2, 4, 6, 8]
    assert_equal(weights_of(config), weights_of(whole))


def test_a_disk_that_stays_full_costs_one_checkpoint_and_the_one_before_stays_whole(make_config: MakeConfig) -> None:
    full = "faults=[{kind: disk_full, rank: 0, step: 3, times: 4}]"  # all attempts at one checkpoint
    config = make_config(*QUICK, full, "checkpoint.keep=9")
    assert run_job(config).status == "done"
    (said,) = [text for text in _texts(config) if "not written" in text]
    assert said.startswith("checkpoint 1-train-0000004 not written by rank [0]: No space left on device")
    assert [r["step"] for r in records_of(config, "checkpoint_failed")] == [4]
    assert [r["step"] for r in records_of(config, "checkpoint")] == [2, 6, 8]
    left = sorted(path.name for path in (config.run.dir / "checkpoints").iterdir())
    assert left == ["1-train-0000002", "1-train-0000006", "1-train-0000008"]  # and nothing of the one that failed


def test_retries_that_would_outlast_the_other_ranks_patience_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"add up to 70 s, while other ranks wait no longer than .* \(20 s\)"):
        make_config("checkpoint.backoff_s=10")


def test_faults_strike_once_in_the_life_of_a_run_directory(
    make_config: MakeConfig, crash_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*QUICK, "faults=[{kind: disk_full, rank: 0, step: 3, times: 1}]")
    crash_at("train", 5)
    with pytest.raises(Crash):
        run_job(config)
    monkeypatch.undo()
    shutil.rmtree(config.run.dir / "checkpoints/1-train-0000004")  # so that step 3 comes again
    run_job(config)
    assert [r["resumed_step"] for r in records_of(config, "run")] == [0, 2]
    assert sum("attempt 2" in text for text in _texts(config)) == 1


def test_faults_are_refused_unless_the_environment_allows_them(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(faults.ALLOW, raising=False)
    file = tmp_path / "job.yaml"
    config = make_config("faults=[{kind: kill_in_hook, rank: 0, step: 3}]")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "distrobust", "train", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("distrobust: faults: 1 are configured, which would break this run; leave them out")
    assert ran.stderr.count("\n") == 1
    assert not config.run.dir.exists()


def test_a_run_without_faults_has_nothing_of_them(make_config: MakeConfig) -> None:
    config = make_config(*QUICK)
    run_job(config)
    assert not (config.run.dir / "faults").exists()


def test_the_rank_that_holds_the_others_up_is_named_with_its_seconds() -> None:
    assert slow_ranks([0.5, 0.4, 2.5, 0.6], ratio=3.0) == {
        2: "rank 2 takes 2.50 s for its own part of a step, the others 0.50 s"
    }
    assert slow_ranks([0.5, 0.4, 0.9, 0.6], ratio=3.0) == {}
    assert slow_ranks([0.001, 0.02], ratio=3.0) == {}  # noise
    assert slow_ranks([7.0], ratio=3.0) == {}  # alone


@pytest.mark.procs
@pytest.mark.timeout(120)
def test_a_slow_worker_is_reported_and_so_is_its_recovery(make_config: MakeConfig, monkeypatch: Any) -> None:
    monkeypatch.setenv(faults.ALLOW, "allow")
    config = make_config(
        *QUICK,
        "cluster.launcher=torchrun",
        "cluster.workers=2",
        "metrics.every=1",
        "cluster.slow_ratio=5",
        "faults=[{kind: slow, rank: 1, step: 2, seconds: 3, times: 2}]",
    )
    file = config.run.dir.parent / "job.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    ran = subprocess.run(
        [sys.executable, "-m", "distrobust", "train", str(file)], capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    texts = [r["text"] for r in jsonl.read(config.run.dir / "metrics.jsonl") if r["event"] == "notice"]
    said = [text for text in texts if re.match(r"train, step [34]: rank 1 takes [3-9]\.\d+ s for its own part", text)]
    assert len(said) == 1
    after = texts[texts.index(said[0]) + 1 :]
    assert any("all ranks are about as fast again" in text for text in after)
