"""Where every rank is when none gets on: the stacks of all threads, in RUN/stacks, named in the error that follows.

One rank that hangs stops all others, who wait for it in a collective until cluster.timeout_s. Each rank has a timer of
half of that, which starts anew with every step and every batch of an evaluation; when it runs out, `faulthandler`
writes what each thread is doing. The timer is one of C: it runs out also while Python's own lock is held. A rank whose
process is gone or stopped writes nothing, and is thereby found too.

A file, rank-N-PID.txt, holds the stalls of one process, the latest last; without one it is removed.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrobust.errors import CommError

_log = logging.getLogger(__name__)


class Watch:
    """The timer of this process, of which there can be one. Running out, it changes nothing but the file."""

    def __init__(self, stacks: Path, rank: int, after_s: float) -> None:
        stacks.mkdir(parents=True, exist_ok=True)
        self.path = stacks / f"rank-{rank}-{os.getpid()}.txt"
        self._rank, self._after_s = rank, after_s
        self._file = self.path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._last = self._started = 0.0
        self.beat()

    def beat(self) -> None:
        """Says that this rank got on. Costs a look at the clock; the timer is set anew now and then only."""
        now, since = time.monotonic(), self._last
        self._last = now
        if now - self._started < self._after_s / 4:
            return
        faulthandler.dump_traceback_later(self._after_s, file=self._file)
        self._started = now
        size = os.fstat(self._file.fileno()).st_size
        if size > self._size:
            _log.warning("rank %d: nothing got on for %.1f s; stacks: %s", self._rank, now - since, self.path)
        self._size = size

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if os.fstat(self._file.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()


@contextmanager
def watched(stacks: Path, rank: int, after_s: float) -> Iterator[Watch]:
    """While the block runs, more than `after_s` seconds (up to a quarter less) between two beats leave stacks."""
    watch = Watch(stacks, rank, after_s)
    try:
        yield watch
    finally:
        watch.close()


@contextmanager
def named(stacks: Path) -> Iterator[None]:
    """Adds to a CommError of the block where the stacks are that were left meanwhile, by whichever rank."""
    before = _sizes(stacks)
    try:
        yield
    except CommError as error:
        left = [path.name for path, size in _sizes(stacks).items() if size > before.get(path, 0)]
        if not left or str(stacks) in str(error):
            raise
        ranks = sorted({int(name.split("-")[1]) for name in left})
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        raise CommError(f"{error}; stacks of {who}: {stacks}") from error


def _sizes(stacks: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in stacks.glob("rank-*-*.txt")}
