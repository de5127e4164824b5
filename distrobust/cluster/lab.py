"""A Ray cluster on one machine, a node in every host of the slow-link lab, and a command run inside it.

Hosts have processes of their own, so that Ray's, however many it starts, end with the host they are in; and a /tmp/ray
of their own, in memory, so that nothing of it stays. Ray is started as on any cluster (`ray start`); only the time in
which it notices a lost node is shorter. No token protects it: nothing outside of the lab's namespaces can reach it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from distrobust.errors import LabError
from distrobust.lab.counters import Wire, wire_sent
from distrobust.lab.hosts import INTERFACE, Switch, address_of, switch
from distrobust.lab.link import Link, parse_link

PORT = 6379
HEAD = 0
_OBJECT_STORE_BYTES = 100_000_000  # a training job has next to nothing in it; Ray's own default is 30 % of the memory
_GRACE_S = 60.0
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # not Ray's 15: hosts of the lab share one machine with whatever else runs there
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True)
class Traffic:
    """What went over a host's link: `sent` by it and `received`, counted at both ends' queues."""

    sent: Wire
    received: Wire


class RayLab:
    """A lab whose hosts are Ray nodes; number 0 is the head. Made by `ray_lab`."""

    def __init__(self, made: Switch, cpus: int, has_jobs: bool) -> None:
        self.switch = made
        self.cpus = cpus
        self.has_jobs = has_jobs
        self.environment = dict(os.environ)
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._logs: dict[int, IO[bytes]] = {}
        self._commands: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """Of Ray's head: what cluster.address takes."""
        return f"{address_of(HEAD)}:{PORT}"

    def add(self) -> int:
        """One more host, in which a node starts; its number."""
        number = self.switch.add()
        host = self.switch.hosts[number]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={self.cpus}"]
        ray += [f"--node-ip-address={host.address}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        if number == HEAD:
            ray += ["--head", f"--port={PORT}", f"--include-dashboard={str(self.has_jobs).lower()}"]
            ray += [f"--dashboard-host={host.address}"] if self.has_jobs else []
        else:
            ray += [f"--address={self.address}"]  # waits for the head
        log = tempfile.TemporaryFile()  # noqa: SIM115  closed in remove
        script = 'mkdir -p /tmp/ray && mount -t tmpfs ray /tmp/ray && exec "$@"'
        self._logs[number] = log
        self._nodes[number] = subprocess.Popen(
            [*host.enter, "sh", "-c", script, "node", *ray],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the command
            env={**self.environment, **_ENVIRONMENT},
        )
        return number

    def remove(self, number: int) -> None:
        """Ends a host as if its power failed; the head's takes all commands with it."""
        self.switch.remove(number)
        if number in self._nodes:  # otherwise the host came about only in part
            self._nodes.pop(number).wait()
            self._logs.pop(number).close()
        if number == HEAD:
            for process in self._commands:
                process.wait()

    def start(self, command: Sequence[str], own_session: bool = True, **files: int | IO[bytes]) -> Command:
        """A command in the head's host, where RAY_ADDRESS is set."""
        variables = {**self.environment, **_ENVIRONMENT, "RAY_ADDRESS": self.address}
        process = subprocess.Popen(
            [*self.switch.hosts[HEAD].enter, *command],
            start_new_session=own_session,
            env=variables,
            **files,  # type: ignore[call-overload]
        )
        self._commands.append(process)
        return Command(process)

    def traffic(self) -> dict[int, Traffic]:
        """By host, since it was made."""
        return {
            number: Traffic(wire_sent(INTERFACE, host.enter), wire_sent(f"p{number}", self.switch.enter))
            for number, host in self.switch.hosts.items()
        }

    def trouble(self) -> str | None:
        """The first node that has ended by itself, with its last words; None if all are up."""
        for number, node in self._nodes.items():
            if node.poll() is not None:
                self._logs[number].seek(0)
                lines = self._logs[number].read().decode(errors="replace").strip().splitlines()
                return f"host {number}: Ray ended with exit code {node.returncode}: {lines[-1] if lines else ''}"
        return None


class Command:
    """A running command. Its process is nsenter's, which waits for the one inside."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def signal(self, number: int) -> None:
        """Sends it to all processes of the command, as a terminal does; but not to nsenter, which would end before."""
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # gone meanwhile
                pid, group = int(status.parent.name), int(status.read_text().rpartition(")")[2].split()[2])
                if group == self.process.pid != pid:
                    os.kill(pid, number)


@contextlib.contextmanager
def ray_lab(num_hosts: int, link: Link, cpus: int = 1, has_jobs: bool = False) -> Iterator[RayLab]:
    """A Ray cluster of `num_hosts` nodes of `cpus` CPUs each, until the block is left. LabError where not allowed.

    has_jobs: whether its head takes `ray job submit`, on port 8265.
    """
    with switch(link, own_processes=True) as made:
        cluster = RayLab(made, cpus, has_jobs)
        programs = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
        cluster.environment["PATH"] = os.pathsep.join(programs)  # jobs and scripts find this `distrobust`
        cluster.environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            for _ in range(num_hosts):
                cluster.add()
            yield cluster
        finally:
            for number in list(made.hosts):
                cluster.remove(number)


def command(num_hosts: int, link: str, cpus: int, arguments: Sequence[str], say: Callable[[str], None]) -> int:
    """What `distrobust lab` does; the exit code of the command it runs."""
    with ray_lab(num_hosts, parse_link(link), cpus) as cluster:
        running = cluster.start(arguments, own_session=not sys.stdin.isatty())
        code = _wait(running)
        if code != 0 and (trouble := cluster.trouble()):
            raise LabError(trouble)
        for number, traffic in cluster.traffic().items():
            sent, received = traffic.sent.bytes / 1e6, traffic.received.bytes / 1e6
            say(f"host {number}: sent {sent:.3f} MB, received {received:.3f} MB")
    return code


def _wait(running: Command) -> int:
    """Ctrl-C and SIGTERM are the command's to answer; a second one, or a minute, ends everything."""

    def pass_on(number: int, _frame: object) -> None:
        signal.signal(number, signal.default_int_handler)
        if not sys.stdin.isatty():  # else the terminal has sent it to the command already
            running.signal(number)
        signal.alarm(round(_GRACE_S))

    def give_up(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, give_up)
    try:
        return running.process.wait()
    finally:
        signal.alarm(0)
        for number, handler in previous.items():
            signal.signal(number, handler)
