"""Real processes: torchrun and Ray Train, killed and brought back."""

import os
import signal
from pathlib import Path

import pytest
from harness.commands import assert_same_models, finish, records, scraped, train, wait_for

LONG = ("--set", "train.epochs=6")  # 48 steps: still under way when a test has seen the first ones


@pytest.mark.procs
@pytest.mark.timeout(300)
def test_torchrun_runs_the_same_function_and_a_killed_rank_loses_nothing(job_file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    process = train(job_file, "--launcher", "torchrun", *LONG, "--set", f"run.dir={whole}")
    output = finish(process)
    assert process.returncode == 0, output
    last = records(whole, "step")[-1]
    assert last["dense_bytes"] > 8 * last["sent_bytes"] > 0

    run = tmp_path / "run"
    process = train(job_file, "--launcher", "torchrun", *LONG)
    wait_for(lambda: any(r["step"] >= 7 for r in records(run, "step")))
    for rank in (0, 1):
        assert scraped(run, rank, "distrobust_comm_sent_bytes_total") > 0
    os.kill(records(run, "run")[-1]["pid"], signal.SIGKILL)
    output = finish(process)
    assert process.returncode != 0
    process = train(job_file, "--launcher", "torchrun", *LONG)
    output = finish(process)
    assert process.returncode == 0, output
    assert records(run, "run")[-1]["resumed_step"] >= 6
    assert_same_models(run, whole)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_ray_brings_a_killed_worker_back_to_the_same_bits(job_file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    process = train(job_file, "--launcher", "torchrun", *LONG, "--set", f"run.dir={whole}")
    output = finish(process)
    assert process.returncode == 0, output

    run = tmp_path / "run"
    process = train(job_file, *LONG)
    wait_for(lambda: any(r["step"] >= 5 for r in records(run, "step")))
    os.kill(records(run, "run")[-1]["pid"], signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    starts = records(run, "run")
    assert len(starts) == 2
    assert starts[-1]["resumed_step"] >= 4
    assert "report.html" in output
    assert_same_models(run, whole)  # and Ray's workers compute what torchrun's do


@pytest.mark.procs
@pytest.mark.timeout(300)
def test_an_address_without_a_ray_head_is_refused_at_once(job_file: Path) -> None:
    process = train(job_file, "--set", "cluster.address=127.0.0.1:1", "--set", "cluster.start_timeout_s=0")
    output = finish(process)
    assert process.returncode == 2
    assert output.startswith("distrobust: cluster.address: got 127.0.0.1:1, where no Ray head answers")
    assert output.count("\n") == 1


def test_a_ray_head_may_be_waited_for_and_the_user_is_told(job_file: Path) -> None:
    process = train(job_file, "--set", "cluster.address=127.0.0.1:1", "--set", "cluster.start_timeout_s=1")
    told, *refused = finish(process).splitlines()
    assert process.returncode == 2
    assert told == "cluster.address: nobody answers at 127.0.0.1:1 yet; waiting 1 s"
    assert len(refused) == 1


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_resources_a_cluster_can_never_give_are_refused(job_file: Path) -> None:
    process = train(job_file, "--set", "cluster.gpu=true")
    output = finish(process)
    assert process.returncode == 2
    assert "2 workers need 2 GPU, the Ray cluster has 0" in output


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_users_mistake_found_by_a_ray_worker_is_one_line_and_exit_code_2(job_file: Path, tmp_path: Path) -> None:
    process = train(job_file, "--set", "train.batch_size=33")
    output = finish(process)
    assert process.returncode == 2
    assert output.strip().splitlines()[-1].startswith("distrobust: train.batch_size: global batch size is 33, wanted")
    assert "Traceback" not in output


@pytest.mark.procs
@pytest.mark.timeout(300)
def test_a_run_continues_with_another_number_of_workers(job_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = train(job_file, "--launcher", "torchrun", *LONG)
    wait_for(lambda: any(r["step"] >= 7 for r in records(run, "step")))
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    process = train(job_file, "--launcher", "local", "--set", "cluster.workers=1", *LONG)
    output = finish(process)
    assert process.returncode == 0, output
    assert [r["world_size"] for r in records(run, "run")] == [2, 1]
    assert records(run, "run")[-1]["resumed_step"] >= 7
    assert records(run, "step")[-1]["step"] == 48
