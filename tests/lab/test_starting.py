"""The scripts of launch/ on simulated hosts, and the command that makes those: as on real ones, and nothing is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import lab as jobs

from distrobust.cluster.lab import RayLab, ray_lab
from distrobust.lab import hosts
from distrobust.lab.link import Link

LAUNCH = Path(__file__).parents[2] / "launch"
BIN = Path(sys.executable).parent
WHY_NOT = hosts.why_not(own_processes=True)
pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(400),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayLab]:
    with ray_lab(3, Link(1e9)) as made:
        made.environment.update(ENVIRONMENT)
        yield made


def _namespaces() -> set[str]:
    """Network namespaces in which this machine runs processes."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.add(os.readlink(process / "ns/net"))
        except OSError:
            continue
    return found


def _answers(cluster: RayLab, port: int) -> bool:
    assert cluster.trouble() is None, cluster.trouble()
    probe = f"exec 3<>/dev/tcp/{cluster.switch.hosts[0].address}/{port}"
    return cluster.start(["bash", "-c", probe], stderr=subprocess.DEVNULL).process.wait() == 0


def _launch(cluster: RayLab, *command: str) -> tuple[int, str]:
    return jobs.finish(
        cluster.start([str(LAUNCH / command[0]), *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    )


def test_cluster_joins_by_address_and_every_worker_finds_its_interface(cluster: RayLab, tmp_path: Path) -> None:
    code, output = _launch(cluster, "cluster", cluster.address, str(jobs.write_job(tmp_path)))
    assert code == 0, output
    (start,) = jobs.records(tmp_path / "run", "run")
    assert start["world_size"] == 3
    assert start["interface"] == hosts.INTERFACE  # the configuration names none
    assert all(one.sent.bytes > 1e5 for one in cluster.traffic().values())


@pytest.mark.skipif(find_spec("aiohttp_cors") is None, reason="needs ray[default]: pip install 'distrobust[cluster]'")
def test_cluster_submits_a_job_and_follows_it(tmp_path: Path) -> None:
    with ray_lab(3, Link(1e9), has_jobs=True) as cluster:
        cluster.environment.update(ENVIRONMENT)
        jobs.wait_for(lambda: _answers(cluster, 8265), "the job server")
        address = f"http://{cluster.switch.hosts[0].address}:8265"
        code, output = _launch(cluster, "cluster", address, str(jobs.write_job(tmp_path)))
    assert code == 0, output
    assert "succeeded" in output
    (start,) = jobs.records(tmp_path / "run", "run")
    assert start["interface"] == hosts.INTERFACE
    assert jobs.records(tmp_path / "run", "done")


def test_torchrun_on_every_host(tmp_path: Path) -> None:
    job = jobs.write_job(tmp_path)
    with hosts.switch(Link(1e9), own_processes=True) as switch:
        for _ in range(3):
            switch.add()
        processes = [
            subprocess.Popen(
                [*host.enter, str(LAUNCH / "torchrun"), "10.231.0.1", "3", str(job)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
            )
            for host in switch.hosts.values()
        ]
        outputs = [process.communicate(timeout=200)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    (start,) = jobs.records(tmp_path / "run", "run")
    assert (start["world_size"], start["interface"]) == (3, hosts.INTERFACE)


# Slurm's commands, for hosts of the lab: a node list is "0,1,2", and a node's name is its address
_SRUN = """#!/bin/bash
nodes=(${SLURM_JOB_NODELIST//,/ }); chosen=()
for argument in "$@"; do
    case $argument in
    --nodelist=*) chosen=("${argument#*=}"); shift ;;
    --exclude=*) for n in "${nodes[@]}"; do [ "$n" = "${argument#*=}" ] || chosen+=("$n"); done; shift ;;
    --*) shift ;;
    *) break ;;
    esac
done
pids=()
trap 'for p in "${pids[@]}"; do kill $(cat /proc/$p/task/$p/children) 2>/dev/null; done' TERM
for node in "${chosen[@]}"; do
    target=$(cat "$LAB_PIDS/$node")
    nsenter --target "$target" --net --pid --mount --wd="$PWD" \\
        sh -c 'mount -t tmpfs ray /tmp/ray; exec "$@"' x "$@" --node-ip-address="$node" &
    pids+=($!)
done
wait
"""


def test_slurms_template_starts_ray_with_a_token_and_ends_it(tmp_path: Path) -> None:
    """On stand-ins for srun and scontrol: there is no Slurm here. The script itself runs outside, so it may enter."""
    bin_, pids = tmp_path / "bin", tmp_path / "pids"
    bin_.mkdir()
    pids.mkdir()
    (bin_ / "srun").write_text(_SRUN)
    (bin_ / "scontrol").write_text('#!/bin/sh\necho "$3" | tr , "\\n"\n')
    job = jobs.write_job(tmp_path)
    with hosts.switch(Link(1e9), own_processes=True) as switch:
        for _ in range(3):
            switch.add()
        addresses = []
        for host in switch.hosts.values():
            addresses.append(host.address)
            (pids / host.address).write_text(host.enter[host.enter.index("--target") + 1])
        # the driver runs on the head: in a batch script's place on a real allocation
        (bin_ / "distrobust").write_text(
            f'#!/bin/sh\nexec {" ".join(switch.hosts[0].enter)} {sys.executable} -m distrobust "$@"\n'
        )
        for tool in bin_.iterdir():
            tool.chmod(0o755)
        with (tmp_path / "out").open("w") as out:  # not a pipe: Ray's nodes have it too, and are drained after the end
            ran = subprocess.run(
                [str(LAUNCH / "slurm"), str(job)],
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=300,
                env={
                    **ENVIRONMENT,
                    "PATH": f"{bin_}:{ENVIRONMENT['PATH']}",
                    "SLURM_SUBMIT_DIR": str(tmp_path),
                    "DISTROBUST_VENV": str(tmp_path / "none"),
                    "SLURM_JOB_NODELIST": ",".join(addresses),
                    "SLURM_JOB_NUM_NODES": "3",
                    "SLURM_CPUS_PER_TASK": "1",
                    "LAB_PIDS": str(pids),
                },
            )
    assert ran.returncode == 0, (tmp_path / "out").read_text()
    (start,) = jobs.records(tmp_path / "run", "run")
    assert start["world_size"] == 3
    _assert_holds_no_secret(tmp_path / "run")


def _assert_holds_no_secret(run: Path) -> None:
    """Nothing that looks like the token the script made: 64 hexadecimal digits that are no digest of a checkpoint."""
    for path in run.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            found = re.findall(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", path.read_bytes())
            assert not found, path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_labs_command_leaves_nothing_however_it_ends(tmp_path: Path, number: int) -> None:
    before = _namespaces()
    ready = tmp_path / "ready"
    process = subprocess.Popen(
        [str(LAUNCH / "lab"), "--hosts", "2", "--", "sh", "-c", f"touch {ready}; sleep 100"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    jobs.wait_for(ready.exists, "the command")
    time.sleep(1.0)  # Ray is being started
    assert len(_namespaces() - before) == 3  # two hosts and the switch
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    jobs.wait_for(lambda: not _namespaces() - before, "the end of everything in the lab", 10)


def test_the_labs_command_hands_on_the_exit_code_and_counts_the_bytes() -> None:
    ran = subprocess.run(
        [str(LAUNCH / "lab"), "--hosts", "2", "--", "sh", "-c", 'test "$RAY_ADDRESS" = 10.231.0.1:6379 && exit 7'],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
    )
    assert ran.returncode == 7
    assert re.findall(r"host (\d): sent [0-9.]+ MB, received [0-9.]+ MB", ran.stderr) == ["0", "1"]


def test_a_bandwidth_that_is_none_is_refused_in_one_line() -> None:
    ran = subprocess.run(
        [str(LAUNCH / "lab"), "--link", "fast", "--", "true"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert ran.returncode == 2
    assert ran.stderr == "distrobust: link: got 'fast', wanted a bandwidth such as 10mbit, 100mbit or 1gbit\n"
