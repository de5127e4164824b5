"""One rank's side of `launch`: reads its arguments, calls the function, answers; ends when its parent does.

    python -m distrobust.bench.rank MODULE:FUNCTION DESCRIPTOR

The function is called as function(arguments, say) and returns what JSON can hold; `say` sends a message meanwhile.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from distrobust.errors import DistrobustError

Say = Callable[[Any], None]


def resolve(target: str) -> Callable[..., Any]:
    """'module:function' -> the function."""
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


@contextlib.contextmanager
def process_group(timeout_s: float = 600.0) -> Iterator[None]:
    """The default gloo group of all ranks that `launch` has started, while the block runs.

    Nobody leaves before all have come to its end: a rank's sockets, and their byte counts, go when the other's do.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def main(target: str, descriptor: int) -> None:
    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(descriptor, "w") as answers:

        def send(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        try:
            value = resolve(target)(arguments, lambda said: send({"said": said}))
            send({"value": value})
        except DistrobustError as error:
            send({"error": str(error)})
        except Exception as error:
            send({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
            raise


def _end_with_parent() -> None:
    """The parent holds the other end of our standard input and never writes again: its end is the parent's."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
