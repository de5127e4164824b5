"""The slow-link lab itself: hosts that reach each other, bytes that are counted, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distrobust.bench import comparison, launch
from distrobust.bench.methods import FLOOR, Method
from distrobust.errors import LabError
from distrobust.lab import hosts as lab
from distrobust.lab import namespaces
from distrobust.lab.link import HEADER_BYTES, Link

WHY_NOT = lab.why_not()
needs_lab = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
pytestmark = [pytest.mark.procs, pytest.mark.timeout(180)]
NUM_BYTES = 400_000


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _pids(hosts: list[lab.Host]) -> list[int]:
    return [int(host.enter[host.enter.index("--target") + 1]) for host in hosts]


def _interfaces() -> set[str]:
    return {line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]}


@needs_lab
def test_hosts_exchange_at_the_links_pace_and_the_wire_carries_more_than_was_counted() -> None:
    """20 Mbit/s: half of the all-reduce's bytes go each way at a time, 400 kB in all from each host, 0.171 s at best.

    Less than that would mean that the link is not shaped; how much more a busy machine makes of it is not asked.
    """
    before, link, heard = _interfaces(), Link(20e6), []
    with lab.lab(2, link) as hosts:
        pids = _pids(hosts)
        assert _interfaces() == before  # this machine's own network is untouched
        results = launch.run(
            hosts,
            "harness.hosts:exchange",
            {"num_bytes": NUM_BYTES, "interface": lab.INTERFACE},
            timeout_s=60,
            heard=lambda rank, said: heard.append((rank, said)),
        )
    assert sorted(heard) == [(0, "nearly done"), (1, "nearly done")]
    for rank, result in enumerate(results):
        assert result["variables"] == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "10.231.0.1",
            "GLOO_SOCKET_IFNAME": "lab0",
        }
        assert result["sum"] == 2.0
        assert result["threads"] == 1
        assert result["seconds"] > (NUM_BYTES - 2 * link.burst_bytes) / (20e6 / 8)
        assert NUM_BYTES <= result["tcp_bytes"] < NUM_BYTES + 5000  # gloo's headers, two barriers
        # every packet has its headers, and one that had to be sent again is on the wire twice
        assert result["wire_bytes"] >= result["tcp_bytes"] + HEADER_BYTES * NUM_BYTES // 1448
        assert result["packets"] >= NUM_BYTES // 1448
    assert not any(_is_alive(pid) for pid in pids)
    assert _interfaces() == before


@needs_lab
@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception_or_ctrl_c(interruption: type[BaseException]) -> None:
    pids: list[int] = []

    def use() -> None:
        with lab.lab(3, Link(1e9)) as hosts:
            pids.extend(_pids(hosts))
            assert all(_is_alive(pid) for pid in pids)
            raise interruption

    with pytest.raises(interruption):
        use()
    assert len(pids) == 3
    assert not any(_is_alive(pid) for pid in pids)


@needs_lab
def test_nothing_is_left_when_the_program_is_killed() -> None:
    code = """
from distrobust.bench import launch
from distrobust.lab import hosts as lab
from distrobust.lab.link import Link
with lab.lab(2, Link(1e9)) as hosts:
    for host in hosts:
        print(host.enter[host.enter.index("--target") + 1], flush=True)
    launch.run(hosts, "harness.hosts:sleep", {}, heard=lambda rank, pid: print(pid, flush=True))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as program:
        assert program.stdout is not None
        pids = [int(program.stdout.readline()) for _ in range(4)]  # two namespaces, two ranks
        assert all(_is_alive(pid) for pid in pids)
        program.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_is_alive(pid) for pid in pids)


@needs_lab
def test_in_the_lab_every_methods_bytes_are_counted_three_ways() -> None:
    """Method's own count <= TCP's (gloo's headers on top) <= the interface's (packet headers on top)."""
    here = "distrobust.bench.methods"
    methods = [Method(FLOOR, f"{here}:floor"), Method("ours", f"{here}:ours", {"density": 0.001})]
    measured = comparison.compare(methods, Link(1e9), steps=2)
    floor, ours = measured.rows
    assert ours.counted_bytes is not None
    assert ours.wire_bytes is not None
    assert 25_557 * 2 < ours.counted_bytes <= ours.payload_bytes < ours.wire_bytes
    assert floor.payload_bytes < 2000  # barriers only
    assert ours.median_s > floor.median_s


def test_a_place_without_the_tools_is_told_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "_PATH", "/nowhere")
    reason = lab.why_not()
    assert reason is not None
    assert "which is not installed: install" in reason
    assert "\n" not in reason
    with pytest.raises(LabError, match="65 hosts, wanted 1 to 64"), lab.lab(65, Link(1e9)):
        pass


def test_without_namespaces_ranks_talk_over_loopback() -> None:
    arguments = {"num_bytes": NUM_BYTES, "interface": None}
    for result in launch.run(lab.local(2), "harness.hosts:exchange", arguments, timeout_s=60):
        assert result["sum"] == 2.0
        assert result["tcp_bytes"] >= NUM_BYTES


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fail_on_one", "host 1: ValueError: two lines of text"),
        ("refuse", "compress.values: got '5bit'"),
        ("die", "ended by signal 9 without a result: last words"),
    ],
)
def test_the_first_error_of_a_host_is_raised_and_the_others_are_ended(function: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(LabError) as caught:
        launch.run(lab.local(2), f"harness.hosts:{function}", {}, timeout_s=60)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 40  # not the minute that the other one sleeps


def test_a_host_that_never_answers_is_given_up() -> None:
    pids: list[int] = []
    with pytest.raises(LabError, match="host 0: no result within 3 s"):
        launch.run(lab.local(1), "harness.hosts:sleep", {}, timeout_s=3, heard=lambda _, pid: pids.append(pid))
    assert not any(_is_alive(pid) for pid in pids)
