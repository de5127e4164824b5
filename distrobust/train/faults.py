"""Faults injected at a named rank and step, each once in the life of a run directory; a slow rank is slow again.

Configured by `faults` and refused unless the environment of the command that starts the run has
DISTROBUST_FAULTS=allow, so that a configuration file alone breaks nothing. A run without faults has no `Faults` and
pays nothing for them: what strikes is put around the functions of one rank at the step where it is due.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distrobust.config.faults import FaultConfig
from distrobust.errors import ConfigError
from distrobust.train.state import TrainState

ALLOW = "DISTROBUST_FAULTS"

Write = Callable[[Path, dict[str, Any]], bytes]

_ERRORS = {"disk_full": errno.ENOSPC, "upload_fails": errno.ETIMEDOUT}
_OF_CHECKPOINTS = ("kill_in_checkpoint", *_ERRORS)


def check_allowed(planned: Sequence[FaultConfig]) -> None:
    """Raises ConfigError if faults are configured and the environment does not allow them."""
    if planned and os.environ.get(ALLOW) != "allow":
        raise ConfigError(
            f"faults: {len(planned)} are configured, which would break this run; leave them out, or set "
            f"{ALLOW}=allow in the environment of this command"
        )


class Faults:
    """Those of one rank. `write`, below, stands in for the function that writes a checkpoint's files."""

    def __init__(self, planned: Sequence[FaultConfig], rank: int, directory: Path, write: Write) -> None:
        self._planned = {i: fault for i, fault in enumerate(planned) if fault.rank == rank}
        self._directory = directory
        self._write = write
        self._failing: list[int] = []  # numbers of errors, for the writes to come

    def before_step(self, state: TrainState) -> None:
        """Arms what is due at the state's position."""
        for number, fault in list(self._planned.items()):
            position = state.position
            if fault.kind == "slow":
                if fault.phase == position.phase and fault.step <= position.step < fault.step + fault.times:
                    _in_next_forward(state, partial(time.sleep, fault.seconds))
                continue
            late = position.step > fault.step and fault.kind in _OF_CHECKPOINTS
            if fault.phase == position.phase and (position.step == fault.step or late):
                del self._planned[number]
                if not self._has_struck(number):
                    self._arm(fault, state)

    def write(self, path: Path, content: dict[str, Any]) -> bytes:
        """Writes a file, or fails to."""
        if not self._failing:
            return self._write(path, content)
        number = self._failing.pop()
        path.write_bytes(b"the first part of it")
        if number == 0:
            _kill()
        raise OSError(number, os.strerror(number))

    def _has_struck(self, number: int) -> bool:
        """In an earlier start of the run; remembered before it strikes, since there may be no time after it."""
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            (self._directory / str(number)).touch(exist_ok=False)
        except FileExistsError:
            return True
        return False

    def _arm(self, fault: FaultConfig, state: TrainState) -> None:
        if fault.kind in _OF_CHECKPOINTS:
            self._failing = [_ERRORS.get(fault.kind, 0)] * fault.times
        elif fault.kind == "kill_in_hook":
            _after(state.compression, "reduce", _kill)
        elif fault.kind == "flip_bit":
            with torch.no_grad():
                bits = next(state.net.parameters()).detach().view(-1).view(torch.int32)
                bits[0] ^= 1 << 20
        else:
            _in_next_forward(state, _kill if fault.kind == "kill_in_forward" else _hang)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    while True:
        time.sleep(3600)


def _in_next_forward(state: TrainState, effect: Callable[[], None]) -> None:
    """In the next pass through the wrapper: attacks go past it."""

    def strike(*_: object) -> None:
        handle.remove()
        effect()

    handle = state.ddp.register_forward_pre_hook(strike)


def _after(owner: object, name: str, effect: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def replaced(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        effect()
        return result

    setattr(owner, name, replaced)
