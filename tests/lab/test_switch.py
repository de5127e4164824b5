"""Hosts that come, go and lose their cable."""

import subprocess
import time
from pathlib import Path

import pytest

from distrobust.errors import LabError
from distrobust.lab import hosts as lab
from distrobust.lab.link import Link

WHY_NOT = lab.why_not(own_processes=True)
pytestmark = [
    pytest.mark.procs,
    pytest.mark.timeout(60),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]


def _reaches(host: lab.Host, port: int, other: str) -> bool:
    """Whether a TCP connection to `other` is answered within a second."""
    connect = f"exec 3<>/dev/tcp/{other}/{port}"
    try:
        return subprocess.run([*host.enter, "bash", "-c", connect], capture_output=True, timeout=1.0).returncode == 0
    except subprocess.TimeoutExpired:
        return False


_LISTEN = """
import socket
server = socket.create_server(("0.0.0.0", 5000))
print("listening", flush=True)
while True:
    server.accept()[0].close()
"""


def _listen(host: lab.Host) -> "subprocess.Popen[str]":
    process = subprocess.Popen([*host.enter, "python3", "-c", _LISTEN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


def test_a_cut_cable_carries_nothing_and_a_restored_one_carries_again() -> None:
    with lab.switch(Link(1e9), own_processes=True) as switch:
        number, second = switch.add(), switch.add()
        first = switch.hosts[number]
        with _listen(first) as server:
            assert _reaches(switch.hosts[second], 5000, first.address)
            switch.cut(second)
            assert not _reaches(switch.hosts[second], 5000, first.address)
            switch.restore(second)
            assert _reaches(switch.hosts[second], 5000, first.address)
            server.kill()


def test_a_hosts_own_processes_end_with_it_and_the_others_stay() -> None:
    with lab.switch(Link(1e9), own_processes=True) as switch:
        stays, goes = switch.add(), switch.add()
        hosts = switch.hosts
        script = "(setsid sh -c 'trap \"\" TERM HUP INT; while true; do sleep 1; done' &) ; echo; wait"
        with (
            subprocess.Popen([*hosts[goes].enter, "sh", "-c", script], stdout=subprocess.DEVNULL),
            _listen(hosts[stays]) as server,
        ):
            started = time.monotonic()
            marker = Path(f"/proc/{hosts[goes].enter[2]}")
            assert marker.exists()
            switch.remove(goes)
            assert not marker.exists()  # the first process inside; the kernel ends all others before it
            assert time.monotonic() - started < 5
            assert _reaches(hosts[stays], 5000, hosts[stays].address)
            server.kill()
        assert list(switch.hosts) == [stays]
        number = switch.add()
        assert switch.hosts[number].address == "10.231.0.3"  # no address is used twice


def test_a_lab_has_at_most_64_hosts_and_says_so() -> None:
    with lab.switch(Link(1e9)) as switch:
        switch._num_made = lab.MAX_HOSTS
        with pytest.raises(LabError, match="64 hosts were made already"):
            switch.add()
