"""The slow-link lab: several hosts on one machine, each in a network namespace, joined by shaped links.

    host 0 (10.231.0.1) lab0 ──tbf── tbf── p0 ┐
    host 1 (10.231.0.2) lab0 ──tbf── tbf── p1 ┼ bridge, in a namespace of its own
    ...                                       ┘

The machine's own network is untouched and no packet leaves it. Every namespace is held by one `cat` that reads from a
pipe of this process: when this process ends, however it ends, the pipes close, the cats end and the kernel takes the
namespaces, interfaces and bridge away. Nothing has a name, nothing is mounted, nothing has to be found and killed.

Works as root, or in a user namespace where the system allows one. Both ends of every cable are shaped with a token
bucket (tbf); propagation delay is not simulated (netem is missing from many kernels), so the lab's latency is that
of a switch, some 50 us.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from distrobust.bench.link import Link
from distrobust.errors import LabError

INTERFACE = "lab0"  # a name no real interface has, so nothing can pick the wrong one
MAX_HOSTS = 64
_TOOLS = ("unshare", "nsenter", "ip", "tc", "cat", "sh")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # users often have no sbin in theirs
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Host:
    """Where one rank runs: the command that enters it, its address, its interface."""

    enter: tuple[str, ...]
    address: str
    interface: str
    shaped: bool


@contextlib.contextmanager
def lab(num_hosts: int, link: Link) -> Iterator[list[Host]]:
    """`num_hosts` hosts that reach each other over `link`, until the block is left. LabError where not allowed."""
    if not 1 <= num_hosts <= MAX_HOSTS:
        raise LabError(f"lab: got {num_hosts} hosts, wanted 1 to {MAX_HOSTS}")
    with contextlib.ExitStack() as stack:
        enter_switch = _hold_switch(stack)
        _sh(enter_switch, "ip link add br0 type bridge\nip link set br0 up")
        hosts = []
        for number in range(num_hosts):
            keeper = _hold(stack, [*_user_only(enter_switch), find_tool("unshare"), "--net"])
            enter = _enter(keeper.pid, user=_is_user(enter_switch))
            address = f"10.231.0.{number + 1}"
            shape = f"tbf rate {link.bits_per_s:.0f}bit burst {link.burst_bytes} latency 50ms"
            _sh(
                enter_switch,
                f"ip link add p{number} type veth peer name {INTERFACE} netns {keeper.pid}\n"
                f"ip link set p{number} master br0 up\n"
                f"tc qdisc add dev p{number} root {shape}",
            )
            _sh(
                enter,
                "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 2>/dev/null || true\n"  # no stray packets in the counters
                f"ip addr add {address}/24 dev {INTERFACE}\n"
                f"ip link set {INTERFACE} up\nip link set lo up\n"
                f"tc qdisc add dev {INTERFACE} root {shape}",
            )
            hosts.append(Host(enter, address, INTERFACE, shaped=True))
        yield hosts


def why_not() -> str | None:
    """Why there can be no lab here, as one sentence; None where there can. Builds one host to find out."""
    try:
        with lab(1, Link(100e6)):
            return None
    except LabError as error:
        return str(error)


def local(num_hosts: int) -> list[Host]:
    """What is left without a lab: processes of this machine over its loopback, unshaped."""
    return [Host((), "127.0.0.1", "lo", shaped=False) for _ in range(num_hosts)]


def _hold_switch(stack: contextlib.ExitStack) -> tuple[str, ...]:
    """How to enter the bridge's namespace: made directly if we may, else inside a user namespace where we are root."""
    if not sys.platform.startswith("linux"):
        raise LabError(f"the slow-link lab needs Linux' network namespaces, this is {sys.platform}")
    for tool in _TOOLS:
        find_tool(tool)
    errors = []
    for options in (["--net"], ["--map-root-user", "--net"]):
        try:
            keeper = _hold(stack, [find_tool("unshare"), *options])
        except LabError as error:
            errors.append(f"unshare {' '.join(options)}: {error}")
            continue
        return _enter(keeper.pid, user="--map-root-user" in options)
    raise LabError(f"the slow-link lab is not allowed here: it needs root or user namespaces ({'; '.join(errors)})")


def _hold(stack: contextlib.ExitStack, command: list[str]) -> subprocess.Popen[str]:
    """A process that does nothing inside the namespaces that `command` makes, until our end of its pipe closes."""
    process = subprocess.Popen(
        [*command, find_tool("sh"), "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us; we then end it in order
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    stack.callback(_release, process)
    if process.stdout.readline() != "ready\n":
        process.wait(_TIMEOUT_S)
        raise LabError(_last_line(process.stderr.read()) or f"{command[0]} failed")
    return process


def _release(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    try:
        process.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _enter(pid: int, user: bool) -> tuple[str, ...]:
    as_root = ("--user", "--preserve-credentials") if user else ()
    return (find_tool("nsenter"), "--target", str(pid), *as_root, "--net")


def _is_user(enter: tuple[str, ...]) -> bool:
    return "--user" in enter


def _user_only(enter: tuple[str, ...]) -> list[str]:
    """The part of `enter` that joins the user namespace: hosts must belong to it for cables to be moved there."""
    return list(enter[:-1]) if _is_user(enter) else []


def _sh(enter: tuple[str, ...], script: str) -> None:
    """Runs `script` in a namespace; the first command that fails is a LabError with its own message."""
    ran = subprocess.run(
        [*enter, find_tool("sh"), "-e", "-c", script],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        env={**os.environ, "PATH": _PATH},
    )
    if ran.returncode != 0:
        raise LabError(f"the slow-link lab cannot be set up here: {_last_line(ran.stderr) or script.splitlines()[-1]}")


def find_tool(name: str) -> str:
    """The path of a program of the system; LabError naming the package that has it."""
    found = shutil.which(name, path=_PATH)
    if found is None:
        package = "util-linux" if name in ("unshare", "nsenter") else "iproute2"
        raise LabError(f"the slow-link lab needs `{name}`, which is not installed: install {package}")
    return found


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
