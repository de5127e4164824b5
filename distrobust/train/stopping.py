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
KILLED_S = 10.0  # for the thread to see it: a process that ends before its threads may abort


def supervised(
    work: Callable[[], object], directory: RunDirectory, kill: Callable[[], object] | None = None
) -> BaseException | None:
    """Runs `work`, which starts the workers and waits for them, in a thread; returns what it raised.

    Ray and torch's agent would otherwise take over Ctrl-C and kill workers before they have written a checkpoint. Here
    the first SIGINT or SIGTERM asks them to leave; the second raises KeyboardInterrupt, after `kill`, which is to end
    the work.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # Ray raises KeyboardInterrupt here too
            failures.append(error)

    def ask_to_stop(number: int, _frame: object) -> None:
        directory.stop.touch()
        signal.signal(number, signal.default_int_handler)

    thread = threading.Thread(target=run, name="workers", daemon=True)
    previous_handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    except KeyboardInterrupt:
        if kill is not None:
            kill()
            thread.join(KILLED_S)
        raise
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    return failures[0] if failures else None


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
