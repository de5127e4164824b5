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


@pytest.fixture(autouse=True)
def _without_a_default_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_OUTSIDE", "no-such-host.invalid")


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


@pytest.mark.parametrize("head", ["127.0.0.1", "127.0.1.1"])
def test_the_head_whose_name_leads_to_loopback_takes_the_default_route(
    monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    """Debian gives a host's own name the address 127.0.1.1."""
    assert interface.is_here(head)
    assert interface.own_address(head) == "127.0.0.1"  # there is none
    given = interface.address_towards
    monkeypatch.setattr(interface, "_OUTSIDE", "outside")
    monkeypatch.setattr(interface, "address_towards", lambda host: "10.0.0.7" if host == "outside" else given(host))
    monkeypatch.setattr(interface, "_holding", {"10.0.0.7": "eth7", "127.0.0.1": "lo"}.get)
    assert interface.own_address(head) == "10.0.0.7"
    assert interface.towards(head) == "eth7"
    interface.use(None, head)
    assert [os.environ[name] for name in interface.VARIABLES] == ["eth7", "eth7"]


def test_scripts_get_the_address_and_whether_the_head_is_here() -> None:
    command = [sys.executable, "-m", "distrobust.train.interface", "127.0.1.1", "1"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "127.0.0.1 true\n"
    command[-1] = "2"
    default = interface.address_towards("198.51.100.1") or "127.0.0.1"
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"{default} true\n"
    command[-2] = "no-such-host.invalid"
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "no-such-host.invalid: no route to it, or no such host\n")


def test_every_interface_with_an_address_is_found_by_it() -> None:
    assert interface._holding("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface._holding("192.0.2.255") is None
