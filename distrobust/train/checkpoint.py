"""Checkpoints of a run: written by all ranks, visible all at once, verified before use.

    checkpoints/1-train-0000392/
        shared.pt       what is the same on every rank: parameters, optimizer
        rank-0.pt ...   what is a rank's own: residuals, batch-norm statistics, noise, byte counts
        manifest.json   phase, step, number of ranks, SHA-256 of every file; written last

Files go into a hidden directory first, which gets its name when every rank has written; a crash at any moment leaves
the previous checkpoint as it was. Loading unpickles tensors and plain values only (weights_only): a file runs no code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distrobust.comm.transport import Transport
from distrobust.errors import CheckpointError

_log = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_HEADER_BYTES = 3  # whether all was written, attempts, number of the error


@dataclass(frozen=True)
class Position:
    """Where a run is: phase number (0 pretrain, 1 train), its name, and steps done in it."""

    ordinal: int
    phase: str
    step: int

    @property
    def directory_name(self) -> str:
        return f"{self.ordinal}-{self.phase}-{self.step:07d}"


@dataclass(frozen=True)
class Retries:
    """Further attempts at a file that could not be written; seconds before the first, doubled for each one after."""

    number: int = 0
    backoff_s: float = 0.0


@dataclass(frozen=True)
class Written:
    """The same on all ranks. `problem`: why there is no checkpoint, None if there is; `notice`: what else to say."""

    problem: str | None
    notice: str | None = None


def save(
    root: Path,
    position: Position,
    shared: dict[str, Any],
    own: dict[str, Any],
    transport: Transport,
    keep: int,
    retries: Retries = Retries(),
    write_file: Callable[[Path, dict[str, Any]], bytes] | None = None,
) -> Written:
    """Called by every rank. write_file: writes a file and returns its SHA-256; None: `write`, below."""
    final = root / position.directory_name
    hidden = root / f".{position.directory_name}"
    names = {f"rank-{transport.rank}.pt": own}
    if transport.rank == 0:
        names["shared.pt"] = shared
    row = torch.zeros(_HEADER_BYTES + 2 * _DIGEST_BYTES, dtype=torch.uint8)
    attempts = 0
    while row[0] == 0 and attempts <= retries.number:
        if attempts:
            time.sleep(retries.backoff_s * 2 ** (attempts - 1))
        attempts += 1
        row[2] = 0
        try:
            hidden.mkdir(parents=True, exist_ok=True)
            for slot, (name, content) in enumerate(names.items()):
                digest = (write_file or write)(hidden / name, content)
                start = _HEADER_BYTES + slot * _DIGEST_BYTES
                row[start : start + _DIGEST_BYTES] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
            row[0] = 1
        except OSError as error:
            row[2] = min(error.errno or errno.EIO, 255)
            _log.error("%s, attempt %d: %s", hidden, attempts, error)
    row[1] = attempts
    rows = transport.gather_rows(row)
    failed = [rank for rank, one in enumerate(rows) if not one[0]]
    published = torch.zeros(2, dtype=torch.uint8)
    if transport.rank == 0 and not failed:
        try:
            _publish(hidden, final, position, rows[:, _HEADER_BYTES:])
            _prune(root, keep)
            published[0] = 1
        except OSError as error:
            published[1] = min(error.errno or errno.EIO, 255)
    if transport.rank == 0 and failed:
        shutil.rmtree(hidden, ignore_errors=True)
    is_there, why = (int(value) for value in transport.gather_rows(published)[0])
    if not is_there:
        reason = os.strerror(int(rows[failed[0], 2]) if failed else why)
        return Written(f"checkpoint {final.name} not written by rank {failed or [0]}: {reason} ({root})")
    again = {rank: int(one[1]) for rank, one in enumerate(rows) if one[1] > 1}
    if not again:
        return Written(None)
    ranks = ", ".join(f"rank {rank}'s at attempt {number}" for rank, number in again.items())
    return Written(None, f"checkpoint {final.name}: written, {ranks}")


def size_bytes(root: Path, position: Position) -> int:
    """Size of a checkpoint that was written."""
    return sum(file.stat().st_size for file in (root / position.directory_name).iterdir())


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as one rank reads it. `own` holds this rank's state, or every rank's, in rank order, if
    `was_resized`: it was written by another number of ranks."""

    position: Position
    shared: dict[str, Any]
    own: list[dict[str, Any]]
    was_resized: bool
    notices: tuple[str, ...] = ()
    """What was wrong with newer ones."""


def load(root: Path, transport: Transport) -> Loaded | None:
    """Called by every rank. The newest checkpoint that is whole on all ranks, or None.

    A damaged one is named in the notices and the log, and the one before is taken. Raises CheckpointError if there
    are checkpoints but none is usable.
    """
    candidates = _in_order(root)[::-1]
    damaged: list[Path] = []
    notices: list[str] = []
    for directory in candidates:
        content, problem = None, ""
        try:
            content = _read(directory, transport)
        except (OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            problem = " ".join(str(error).split())[:200]
        whole = torch.tensor([content is not None], dtype=torch.uint8)
        if bool(transport.gather_rows(whole).all()):
            if transport.rank == 0:
                for unusable in damaged:
                    _put_aside(unusable)
            return None if content is None else dataclasses.replace(content, notices=tuple(notices))
        notices.append(
            f"checkpoint {directory.name} is damaged ({problem or 'for another rank'}) and put aside as "
            f"damaged-{directory.name}; trying the one before"
        )
        _log.error(notices[-1])
        damaged.append(directory)
    if candidates:
        raise CheckpointError(f"{root}: none of {len(candidates)} checkpoints is whole; delete them to start afresh")
    return None


def _put_aside(damaged: Path) -> None:
    """Out of the way, so that it does not count among those to keep; what cannot be moved will be replaced."""
    place = damaged.with_name(f"damaged-{damaged.name}")
    shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):
        damaged.rename(place)


def write(path: Path, content: dict[str, Any]) -> bytes:
    """Writes a file of a checkpoint through to the disk; its SHA-256."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getbuffer()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).digest()


def _publish(hidden: Path, final: Path, position: Position, rows: torch.Tensor) -> None:
    """rows: of every rank, the digests of its own file and of the shared one."""
    digests = {}
    for rank, row in enumerate(rows):
        digests[f"rank-{rank}.pt"] = bytes(row[:_DIGEST_BYTES].tolist()).hex()
    digests["shared.pt"] = bytes(rows[0, _DIGEST_BYTES:].tolist()).hex()
    manifest = {
        "ordinal": position.ordinal,
        "phase": position.phase,
        "step": position.step,
        "num_ranks": len(rows),
        "sha256": digests,
    }
    with (hidden / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # a resumed run is back at a step it has saved before
        os.replace(final, final.with_name(f".{final.name}-old"))
    os.replace(hidden, final)


def _prune(root: Path, keep: int) -> None:
    for old in _in_order(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for abandoned in root.glob(".[0-9]-*"):
        shutil.rmtree(abandoned, ignore_errors=True)


def _in_order(root: Path) -> list[Path]:
    """Checkpoints from the oldest to the newest; a step may have more digits than its name has places."""
    found = [(re.fullmatch(r"(\d)-[a-z]+-(\d+)", path.name), path) for path in root.glob("[0-9]-*") if path.is_dir()]
    placed = [((int(match[1]), int(match[2])), path) for match, path in found if match is not None]
    return [path for _, path in sorted(placed)]


def _read(directory: Path, transport: Transport) -> Loaded:
    manifest = json.loads((directory / "manifest.json").read_text())
    resized = manifest["num_ranks"] != transport.num_ranks
    ranks = range(manifest["num_ranks"]) if resized else [transport.rank]
    contents = []
    for name in ("shared.pt", *(f"rank-{rank}.pt" for rank in ranks)):
        data = (directory / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest["sha256"][name]:
            raise ValueError(f"{name} does not match its digest")
        contents.append(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    position = Position(manifest["ordinal"], manifest["phase"], manifest["step"])
    return Loaded(position, contents[0], contents[1:], resized)
