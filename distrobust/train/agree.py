"""What one rank cannot do, none does: its error becomes everybody's, instead of a wait for a timeout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from distrobust.comm.transport import Transport
from distrobust.errors import CommError, DataError, DistrobustError

T = TypeVar("T")


def on_all_ranks(work: Callable[[], T]) -> T:
    """Does `work` on every rank; raises the error of the lowest rank that met one. CommError if a rank is gone."""
    mine: DistrobustError | None = None
    try:
        result = work()
    except DistrobustError as error:
        mine = error
    except OSError as error:
        mine = DataError(f"rank {dist.get_rank()}: {error.filename or 'a file'}: {error.strerror}")
    everyone: list[DistrobustError | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(everyone, mine)
    except RuntimeError as error:
        raise CommError(Transport().explain(error)) from error
    first = next((error for error in everyone if error is not None), None)
    if first is not None:
        raise first
    return result
