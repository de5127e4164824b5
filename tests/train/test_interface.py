"""The interface to another host is that of the route to it."""

import os
import socket
import subprocess
import sys

import pytest

from distrobust.train import interface


@pytest.fixture(autouse=True)
def _without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in interface.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_loopback_is_reached_through_its_own_interface() -> None:
    assert interface.towards("127.0.0.1") == "lo"
    assert interface.address_towards("localhost") == "127.0.0.1"
    assert interface.is_here("127.0.0.1")


def test_a_host_that_does_not_exist_gives_no_interface_and_no_error() -> None:
    assert interface.towards("no-such-host.invalid") is None
    assert not interface.is_here("no-such-host.invalid")


def test_a_name_wins_over_the_route_and_the_environment_over_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    interface.use(None, "127.0.0.1")
    assert [os.environ[name] for name in interface.VARIABLES] == ["lo", "lo"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "given")
    interface.use(None, "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "given"
    interface.use("named", "127.0.0.1")
    assert [os.environ[name] for name in interface.VARIABLES] == ["named", "named"]


def test_scripts_get_the_address_and_whether_the_head_is_here() -> None:
    command = [sys.executable, "-m", "distrobust.train.interface", "127.0.0.1"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "127.0.0.1 true\n"
    command[-1] = "no-such-host.invalid"
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "no-such-host.invalid: no route to it, or no such host\n")


def test_every_interface_with_an_address_is_found_by_it() -> None:
    assert interface._holding("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface._holding("192.0.2.255") is None
