"""Real processes, interrupted: Ctrl-C writes a checkpoint and leaves; the same command ends with the same bits."""

import signal
from pathlib import Path

import pytest
from harness.commands import assert_same_models, finish, records, train, wait_for


@pytest.mark.procs
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("launcher", "workers"), [("local", 1), ("torchrun", 2)])
def test_ctrl_c_checkpoints_and_leaves(job_file: Path, tmp_path: Path, launcher: str, workers: int) -> None:
    run = tmp_path / "run"
    options = (
        "--launcher",
        launcher,
        "--set",
        f"cluster.workers={workers}",
        "--set",
        "checkpoint.every=1000",
        "--set",
        "train.epochs=12",
    )
    process = train(job_file, *options)
    wait_for(lambda: any(r["step"] >= 3 for r in records(run, "step")))
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert "a checkpoint was written, start again to continue" in output
    assert process.returncode == 130
    assert len(list((run / "checkpoints").glob("1-train-*"))) >= 1
    whole = tmp_path / "whole"
    for process in (train(job_file, *options), train(job_file, *options, "--set", f"run.dir={whole}")):
        output = finish(process)
        assert process.returncode == 0, output
    assert records(run, "run")[-1]["resumed_step"] >= 3
    assert_same_models(run, whole)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_ctrl_c_through_ray_checkpoints_and_leaves(job_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = train(job_file, "--set", "checkpoint.every=1000", "--set", "train.epochs=500")
    wait_for(lambda: any(r["step"] >= 3 for r in records(run, "step")))
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert "a checkpoint was written, start again to continue" in output
    assert process.returncode == 130
    assert list((run / "checkpoints").glob("1-train-*"))
