"""Requests to stop: a signal to this process, or a file in the run directory."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distrobust.train.rundir import RunDirectory

SECOND_SIGNAL_S = 2.0


@contextmanager
def stop_requests(directory: RunDirectory) -> Iterator[Callable[[], bool]]:
    """Whether to leave: the run directory's stop file, or SIGINT or SIGTERM to this process. A later second kills."""
    asked: list[float] = []
    previous: dict[int, Any] = {}

    def handle(number: int, _frame: object) -> None:
        # a terminal and torchrun both send the first one; a person's second thought comes later
        if asked and time.monotonic() - asked[0] > SECOND_SIGNAL_S:
            signal.signal(number, previous[number] or signal.SIG_DFL)
            signal.raise_signal(number)
        asked.append(time.monotonic())

    if threading.current_thread() is threading.main_thread():
        for wanted in (signal.SIGINT, signal.SIGTERM):
            previous[wanted] = signal.signal(wanted, handle)
    try:
        yield lambda: bool(asked) or directory.stop.exists()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
