"""Linux namespaces that last exactly as long as this process wants them.

Every namespace is held by one `cat` that reads from a pipe of this process: when this process ends, however it ends,
the pipe closes, the cat ends and the kernel takes the namespace away, with its interfaces and, if it has processes of
its own, with all of them. Nothing has a name, nothing stays mounted, nothing has to be found and killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from distrobust.errors import LabError

_TOOLS = ("unshare", "nsenter", "ip", "tc", "cat", "sh")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # users often have no sbin in theirs
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Held:
    """Namespaces and the process that holds them. `inside`: the number of a process that is in all of them."""

    process: subprocess.Popen[str]
    inside: int
    enter: tuple[str, ...]

    @property
    def is_user(self) -> bool:
        """Whether they belong to a user namespace, in which we are root."""
        return "--user" in self.enter

    def run(self, script: str) -> None:
        """Runs a shell script inside; the first command that fails is a LabError with its own message."""
        ran = subprocess.run(
            [*self.enter, find_tool("sh"), "-e", "-c", script],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, "PATH": _PATH},
        )
        if ran.returncode != 0:
            reason = _last_line(ran.stderr) or script.splitlines()[-1]
            raise LabError(f"the slow-link lab cannot be set up here: {reason}")

    def release(self) -> None:
        """Ends them; with processes of their own, every process inside too."""
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def hold_network() -> Held:
    """A network namespace: made directly if we may, else inside a user namespace where we are root."""
    if not sys.platform.startswith("linux"):
        raise LabError(f"the slow-link lab needs Linux' network namespaces, this is {sys.platform}")
    for tool in _TOOLS:
        find_tool(tool)
    errors = []
    for options in (["--net"], ["--map-root-user", "--net"]):
        as_root = ("--user", "--preserve-credentials") if "--map-root-user" in options else ()
        try:
            return _hold([find_tool("unshare"), *options], (*as_root, "--net"))
        except LabError as error:
            errors.append(f"unshare {' '.join(options)}: {error}")
    raise LabError(f"the slow-link lab is not allowed here: it needs root or user namespaces ({'; '.join(errors)})")


def hold_beside(held: Held, own_processes: bool) -> Held:
    """Another network namespace, of the same owner as `held`, so that cables can join the two.

    own_processes: processes inside have numbers and a /proc of their own, and all end with it.
    """
    user = held.enter[:-1] if held.is_user else ()  # the part of `enter` that joins the user namespace
    as_root = ("--user", "--preserve-credentials") if held.is_user else ()
    if not own_processes:
        return _hold([*user, find_tool("unshare"), "--net"], (*as_root, "--net"))
    options = ["--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    joins = (*as_root, "--net", "--mount", "--pid", f"--wd={os.getcwd()}")  # with --mount it would start in /
    return _hold([*user, find_tool("unshare"), *options], joins)


def _hold(command: list[str], joins: tuple[str, ...]) -> Held:
    process = subprocess.Popen(
        [*command, find_tool("sh"), "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us; we then end it in order
    )
    assert process.stdout is not None
    assert process.stderr is not None
    held = Held(process, process.pid, ())
    if process.stdout.readline() != "ready\n":
        process.wait(_TIMEOUT_S)
        reason = _last_line(process.stderr.read()) or f"{command[0]} failed"
        held.release()
        raise LabError(reason)
    inside = process.pid
    if "--pid" in joins:  # unshare itself stays outside, its child is the first process inside
        inside = int(Path(f"/proc/{inside}/task/{inside}/children").read_text().split()[0])
    return Held(process, inside, (find_tool("nsenter"), "--target", str(inside), *joins))


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
