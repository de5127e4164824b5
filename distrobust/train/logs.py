"""What a rank's loggers say, as RUN/logs/rank-N.jsonl: one JSON object a line.

    time      unix seconds, as in metrics.jsonl
    level     INFO of ours, WARNING and above of everybody's
    rank, host, pid
    logger    a module's name
    text      the message
    trace     the traceback, where an exception was logged

Warnings go to standard error too, with the rank, unless the program around this one has set up logging for itself.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distrobust.metrics import jsonl

_OURS = "distrobust"
_APART = ("torch", "ray")  # which keep their records from the root logger


class JsonFormatter(logging.Formatter):
    """A record as one line of strict JSON, with the same `who` on every line."""

    def __init__(self, **who: Any) -> None:
        super().__init__()
        self.who = who

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": record.created, "level": record.levelname, **self.who}
        line.update(logger=record.name, text=record.getMessage())
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return jsonl.encode(line)


@contextmanager
def kept(directory: Path, rank: int) -> Iterator[None]:
    """Appends to the file of `rank` in `directory` while the block runs; an exception that leaves it is logged."""
    directory.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(directory / f"rank-{rank}.jsonl", encoding="utf-8")
    to_file.setFormatter(JsonFormatter(rank=rank, host=socket.gethostname(), pid=os.getpid()))
    to_file.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith(_OURS))
    root, ours = logging.getLogger(), logging.getLogger(_OURS)
    added: list[tuple[logging.Logger, logging.Handler]] = [(root, to_file)]
    added += [(apart, to_file) for apart in map(logging.getLogger, _APART) if not apart.propagate]
    if not root.handlers:
        to_stderr = logging.StreamHandler()
        to_stderr.setLevel(logging.WARNING)
        to_stderr.addFilter(lambda record: not record.exc_info)  # what ends the run is told by whoever started it
        to_stderr.setFormatter(logging.Formatter(f"rank {rank}: %(message)s"))
        added.append((root, to_stderr))
    level = ours.level
    ours.setLevel(min(level or logging.INFO, logging.INFO))
    for logger, handler in added:
        logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        ours.error("ended by %s", type(error).__name__, exc_info=True)
        raise
    finally:
        ours.setLevel(level)
        for logger, handler in added:
            logger.removeHandler(handler)
            handler.close()
