"""Several hosts on one machine, each in a network namespace, joined by shaped links to a switch.

    host 0 (10.231.0.1) lab0 ──tbf── tbf── p0 ┐
    host 1 (10.231.0.2) lab0 ──tbf── tbf── p1 ┼ bridge, in a namespace of its own
    ...                                       ┘

The machine's own network is untouched and no packet leaves it; how namespaces come and go is in namespaces.py.

Works as root, or in a user namespace where the system allows one. Both ends of every cable are shaped with a token
bucket (tbf); propagation delay is not simulated (netem is missing from many kernels), so the lab's latency is that
of a switch, some 50 us.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from distrobust.errors import LabError
from distrobust.lab.link import Link
from distrobust.lab.namespaces import Held, hold_beside, hold_network

INTERFACE = "lab0"  # a name no real interface has, so nothing can pick the wrong one
MAX_HOSTS = 64


def address_of(number: int) -> str:
    """Of the host with that number."""
    return f"10.231.0.{number + 1}"


@dataclass(frozen=True)
class Host:
    """Where one rank runs: the command that enters it, its address, its interface."""

    enter: tuple[str, ...]
    address: str
    interface: str
    shaped: bool


class Switch:
    """A switch and the hosts plugged into it, which may come and go. Made by `switch`."""

    def __init__(self, held: Held, link: Link, own_processes: bool) -> None:
        self.link = link
        self._held = held
        self._own_processes = own_processes
        self._hosts: dict[int, tuple[Host, Held]] = {}
        self._num_made = 0

    @property
    def enter(self) -> tuple[str, ...]:
        """The command that enters the switch's namespace, where host n's cable ends in interface `pn`."""
        return self._held.enter

    @property
    def hosts(self) -> dict[int, Host]:
        """Those that are there, by number."""
        return {number: host for number, (host, _) in self._hosts.items()}

    def add(self) -> int:
        """Plugs in one more host; its number, which is never used again."""
        number = self._num_made
        if number >= MAX_HOSTS:
            raise LabError(f"lab: {MAX_HOSTS} hosts were made already, which is the most a lab can have")
        self._num_made += 1
        held = hold_beside(self._held, self._own_processes)
        address = address_of(number)
        self._hosts[number] = (Host(held.enter, address, INTERFACE, shaped=True), held)
        shape = f"tbf rate {self.link.bits_per_s:.0f}bit burst {self.link.burst_bytes} latency 50ms"
        self._held.run(
            f"ip link add p{number} type veth peer name {INTERFACE} netns {held.inside}\n"
            f"ip link set p{number} master br0 up\n"
            f"tc qdisc add dev p{number} root {shape}",
        )
        held.run(
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 2>/dev/null || true\n"  # no stray packets in the counters
            f"ip addr add {address}/24 dev {INTERFACE}\n"
            f"ip link set {INTERFACE} up\nip link set lo up\n"
            f"tc qdisc add dev {INTERFACE} root {shape}",
        )
        return number

    def cut(self, number: int) -> None:
        """Pulls a host's cable: nothing is closed, packets just no longer arrive."""
        self._held.run(f"ip link set p{number} nomaster")

    def restore(self, number: int) -> None:
        """Plugs it in again."""
        self._held.run(f"ip link set p{number} master br0")

    def remove(self, number: int) -> None:
        """Ends a host: its interfaces, and its processes if they are its own."""
        _, held = self._hosts.pop(number)
        held.release()


@contextlib.contextmanager
def switch(link: Link, own_processes: bool = False) -> Iterator[Switch]:
    """A switch without hosts, until the block is left; then it and they are gone. LabError where not allowed.

    own_processes: of every host; they all end with it.
    """
    held = hold_network()
    made = Switch(held, link, own_processes)
    try:
        held.run("ip link add br0 type bridge\nip link set br0 up")
        yield made
    finally:
        for number in list(made.hosts):
            made.remove(number)
        held.release()


@contextlib.contextmanager
def lab(num_hosts: int, link: Link) -> Iterator[list[Host]]:
    """`num_hosts` hosts that reach each other over `link`, until the block is left. LabError where not allowed."""
    if not 1 <= num_hosts <= MAX_HOSTS:
        raise LabError(f"lab: got {num_hosts} hosts, wanted 1 to {MAX_HOSTS}")
    with switch(link) as made:
        for _ in range(num_hosts):
            made.add()
        yield list(made.hosts.values())


def why_not(own_processes: bool = False) -> str | None:
    """Why there can be no lab here, as one sentence; None where there can. Builds one host to find out."""
    try:
        with switch(Link(100e6), own_processes) as made:
            made.add()
            return None
    except LabError as error:
        return str(error)


def local(num_hosts: int) -> list[Host]:
    """What is left without a lab: processes of this machine over its loopback, unshaped."""
    return [Host((), "127.0.0.1", "lo", shaped=False) for _ in range(num_hosts)]
