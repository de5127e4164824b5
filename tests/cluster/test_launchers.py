"""Real processes: torchrun and Ray Train, killed and brought back."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from distrobust.metrics import jsonl
from distrobust.train.modelfile import read_model_file
from tests.train.conftest import write_stripes

CLI = [sys.executable, "-m", "distrobust"]


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """Two workers: 16 steps of fine-tuning, a checkpoint after every second one."""
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "cluster": {"workers": 2, "timeout_s": 30},
        "data": {"path": str(write_stripes(tmp_path / "data", num_train=320)), "held_out": 0.2},
        "model": {"name": "cnn"},
        "train": {"epochs": 2, "batch_size": 32, "gradient_noise": 1e-6},
        "attack": {"name": "pgd", "steps": 2, "eps": 0.05, "ramp": 0.5},
        "compress": {"density": 0.02, "warmup": 0.1},
        "noise": {},
        "checkpoint": {"every": 2},
        "metrics": {"every": 1, "port": 0},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _train(file: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, "train", str(file), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _finish(process: subprocess.Popen[str], seconds: float = 200) -> str:
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return output


def _records(run: Path, event: str) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [r for r in jsonl.read(path) if r["event"] == event] if path.exists() else []


def _wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def _scraped(run: Path, rank: int, metric: str) -> float:
    """The sum of a metric over its labels, from the address the worker left for Prometheus."""
    (target,) = json.loads((run / f"prometheus/rank-{rank}.json").read_text())[0]["targets"]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return sum(sample.value for family in families for sample in family.samples if sample.name == metric)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return read_model_file(run / "models/fine-tuned.pt")["state"]  # type: ignore[no-any-return]


def _assert_equal(ours: Path, theirs: Path) -> None:
    a, b = _weights(ours), _weights(theirs)
    assert not [name for name, tensor in a.items() if not torch.equal(tensor, b[name])]


@pytest.mark.procs
@pytest.mark.timeout(300)
def test_torchrun_runs_the_same_function_and_a_killed_rank_loses_nothing(job_file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    process = _train(job_file, "--launcher", "torchrun", "--set", f"run.dir={whole}")
    output = _finish(process)
    assert process.returncode == 0, output
    last = _records(whole, "step")[-1]
    assert last["dense_bytes"] > 8 * last["sent_bytes"] > 0

    run = tmp_path / "run"
    process = _train(job_file, "--launcher", "torchrun")
    _wait_for(lambda: any(r["step"] >= 7 for r in _records(run, "step")))
    for rank in (0, 1):
        assert _scraped(run, rank, "distrobust_comm_sent_bytes_total") > 0
    os.kill(_records(run, "run")[-1]["pid"], signal.SIGKILL)
    output = _finish(process)
    assert process.returncode != 0
    process = _train(job_file, "--launcher", "torchrun")
    output = _finish(process)
    assert process.returncode == 0, output
    assert _records(run, "run")[-1]["resumed_step"] >= 6
    _assert_equal(run, whole)


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
    process = _train(job_file, *options)
    _wait_for(lambda: any(r["step"] >= 3 for r in _records(run, "step")))
    process.send_signal(signal.SIGINT)
    output = _finish(process)
    assert "a checkpoint was written, start again to continue" in output
    assert process.returncode == 130
    assert len(list((run / "checkpoints").glob("1-train-*"))) >= 1
    process = _train(job_file, *options)
    output = _finish(process)
    assert process.returncode == 0, output
    assert _records(run, "run")[-1]["resumed_step"] >= 3


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_ray_brings_a_killed_worker_back_to_the_same_bits(job_file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    process = _train(job_file, "--launcher", "torchrun", "--set", f"run.dir={whole}")
    output = _finish(process)
    assert process.returncode == 0, output

    run = tmp_path / "run"
    process = _train(job_file)
    _wait_for(lambda: any(r["step"] >= 5 for r in _records(run, "step")))
    os.kill(_records(run, "run")[-1]["pid"], signal.SIGKILL)
    output = _finish(process)
    assert process.returncode == 0, output
    starts = _records(run, "run")
    assert len(starts) == 2
    assert starts[-1]["resumed_step"] >= 4
    assert "report.html" in output
    _assert_equal(run, whole)  # and Ray's workers compute what torchrun's do


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_ctrl_c_through_ray_checkpoints_and_leaves(job_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _train(job_file, "--set", "checkpoint.every=1000", "--set", "train.epochs=500")
    _wait_for(lambda: any(r["step"] >= 3 for r in _records(run, "step")))
    process.send_signal(signal.SIGINT)
    output = _finish(process)
    assert "a checkpoint was written, start again to continue" in output
    assert process.returncode == 130
    assert list((run / "checkpoints").glob("1-train-*"))


@pytest.mark.procs
@pytest.mark.timeout(300)
def test_an_address_without_a_ray_head_is_refused_at_once(job_file: Path) -> None:
    process = _train(job_file, "--set", "cluster.address=127.0.0.1:1")
    output = _finish(process)
    assert process.returncode == 2
    assert output.startswith("distrobust: cluster.address: got 127.0.0.1:1, where no Ray head answers")
    assert output.count("\n") == 1


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_resources_a_cluster_can_never_give_are_refused(job_file: Path) -> None:
    process = _train(job_file, "--set", "cluster.gpu=true")
    output = _finish(process)
    assert process.returncode == 2
    assert "2 workers need 2 GPU, the Ray cluster has 0" in output


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_users_mistake_found_by_a_ray_worker_is_one_line_and_exit_code_2(job_file: Path, tmp_path: Path) -> None:
    process = _train(job_file, "--set", "train.batch_size=33")
    output = _finish(process)
    assert process.returncode == 2
    assert output.strip().splitlines()[-1].startswith("distrobust: train.batch_size: global batch size is 33, wanted")
    assert "Traceback" not in output


@pytest.mark.procs
@pytest.mark.timeout(300)
def test_a_run_continues_with_another_number_of_workers(job_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _train(job_file, "--launcher", "torchrun")
    _wait_for(lambda: any(r["step"] >= 7 for r in _records(run, "step")))
    process.send_signal(signal.SIGINT)
    output = _finish(process)
    assert process.returncode == 130, output
    process = _train(job_file, "--launcher", "local", "--set", "cluster.workers=1")
    output = _finish(process)
    assert process.returncode == 0, output
    assert [r["world_size"] for r in _records(run, "run")] == [2, 1]
    assert _records(run, "run")[-1]["resumed_step"] >= 7
    assert _records(run, "step")[-1]["step"] == 16
