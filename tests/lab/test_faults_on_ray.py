"""What a run on a Ray cluster promises when workers, links, nodes or the head fail; one test for each promise.

In every one: nothing waits longer than the timeout of a collective, replicas never differ (the run compares their
parameters at every step here, and ends with an error if they do), and what the end of the run is compared with is the
same job without faults.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import lab as jobs

from distrobust.cluster.lab import HEAD, RayLab, ray_lab
from distrobust.lab import hosts
from distrobust.lab.link import Link

WHY_NOT = hosts.why_not(own_processes=True)
pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(600),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]


@contextlib.contextmanager
def _three_nodes() -> Iterator[RayLab]:
    with ray_lab(3, Link(100e6)) as cluster:
        cluster.environment["DISTROBUST_FAULTS"] = "allow"
        yield cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayLab]:
    """Of tests that leave it as it was."""
    with _three_nodes() as made:
        yield made


def test_workers_killed_anywhere_or_hanging_lose_nothing(cluster: RayLab, tmp_path: Path) -> None:
    """In the forward pass, in the hook and while a checkpoint is written; each on another rank. To the bit."""
    faults = [
        {"kind": "kill_in_forward", "rank": 1, "step": 3},
        {"kind": "kill_in_hook", "rank": 2, "step": 6},
        {"kind": "kill_in_checkpoint", "rank": 0, "step": 9},
        {"kind": "hang", "rank": 1, "step": 12},
    ]
    job = jobs.write_job(tmp_path, faults=faults)
    code, output = jobs.finish(jobs.start(cluster, job), 400)
    assert code == 0, output
    run = tmp_path / "run"
    starts = jobs.records(run, "run")
    # a checkpoint after every second step: what was done since is done again, and the one under way when it was
    # killed is not there
    assert [r["resumed_step"] for r in starts] == [0, 2, 6, 8, 12]
    struck = [max(r["time"] for r in jobs.records(run, "step") if r["time"] < s["time"]) for s in starts[1:]]
    back_s = [s["time"] - t for s, t in zip(starts[1:], struck, strict=True)]
    assert max(back_s[:3]) < jobs.TIMEOUT_S + 45  # seconds without a step; Ray takes some to start workers
    assert back_s[3] < 2 * jobs.TIMEOUT_S + 45  # nothing closes a hanging worker's connections: the others time out
    jobs.assert_same_bits(run, jobs.uninterrupted(job, tmp_path / "whole"))


def test_a_link_that_is_cut_and_restored_costs_time_only(cluster: RayLab, tmp_path: Path) -> None:
    job = jobs.write_job(tmp_path)
    run = tmp_path / "run"
    command = jobs.start(cluster, job)
    jobs.wait_for_step(run, 4)
    cluster.switch.cut(2)
    time.sleep(4.0)
    cut_at = len(jobs.records(run, "step"))
    time.sleep(1.0)
    assert len(jobs.records(run, "step")) == cut_at  # it really was
    cluster.switch.restore(2)
    code, output = jobs.finish(command)
    assert code == 0, output
    assert len(jobs.records(run, "run")) == 1
    jobs.assert_same_bits(run, jobs.uninterrupted(job, tmp_path / "whole"))


def test_a_run_goes_on_with_fewer_workers_and_takes_in_new_ones(tmp_path: Path) -> None:
    """A node fails for good, another one comes; two tenths of a second a step leave the time for both."""
    paced = [{"kind": "slow", "rank": 0, "step": 0, "seconds": 0.2, "times": 100_000}]
    cluster_section = {"min_workers": 2, "resize_every_s": 5.0, "slow_ratio": None}
    job = jobs.write_job(tmp_path, faults=paced, cluster=cluster_section, train={"epochs": 48})
    run = tmp_path / "run"
    with _three_nodes() as cluster:
        command = jobs.start(cluster, job)
        jobs.wait_for_step(run, 5)
        cluster.remove(2)
        lost = time.monotonic()
        jobs.wait_for_step(run, 7, start=1)
        assert time.monotonic() - lost < 2 * jobs.TIMEOUT_S + 60
        cluster.add()
        code, output = jobs.finish(command, 300)
        assert code == 0, output
    starts = jobs.records(run, "run")
    sizes = [r["world_size"] for r in starts]
    assert sizes[0] == sizes[-1] == 3
    assert 2 in sizes
    assert starts[1]["resumed_step"] >= 4
    assert jobs.records(run, "step")[-1]["step"] == 384
    assert not jobs.records(run, "diverged")
    whole = jobs.uninterrupted(job, tmp_path / "whole")
    ends = [[r["loss"] for r in jobs.records(one, "step")][-40:] for one in (run, whole)]
    # rows are dealt out anew after a change, so it is not the same run: the same loss within the spread of its steps
    assert abs(statistics.fmean(ends[0]) - statistics.fmean(ends[1])) < 3 * statistics.stdev(ends[1])


def test_when_the_head_is_killed_the_same_command_on_a_new_cluster_continues(tmp_path: Path) -> None:
    job = jobs.write_job(tmp_path)
    run = tmp_path / "run"
    with _three_nodes() as cluster:
        driver = jobs.start(cluster, job)
        jobs.wait_for_step(run, 7)
        cluster.remove(HEAD)  # with the driver, as in a cluster whose job manager starts both again
        code, _ = jobs.finish(driver)
        assert code != 0
    with _three_nodes() as cluster:
        code, output = jobs.finish(jobs.start(cluster, job))
        assert code == 0, output
    assert [r["resumed_step"] >= 6 for r in jobs.records(run, "run")] == [False, True]
    jobs.assert_same_bits(run, jobs.uninterrupted(job, tmp_path / "whole"))


def test_a_flipped_bit_ends_the_run_before_a_checkpoint_holds_it(cluster: RayLab, tmp_path: Path) -> None:
    """On rank 0, whose parameters are those that are written; the same command then continues from before it."""
    flip = [{"kind": "flip_bit", "rank": 0, "step": 7}]
    job = jobs.write_job(tmp_path, faults=flip, metrics={"every": 100})
    run = tmp_path / "run"
    code, output = jobs.finish(jobs.start(cluster, job))
    assert code == 2
    assert "train, step 8: parameters of ranks [1, 2] differ from rank 0; start again to continue" in output
    assert sorted(path.name for path in (run / "checkpoints").glob("[0-9]-*"))[-1] == "1-train-0000006"
    code, output = jobs.finish(jobs.start(cluster, job))
    assert code == 0, output
    jobs.assert_same_bits(run, jobs.uninterrupted(job, tmp_path / "whole"))
