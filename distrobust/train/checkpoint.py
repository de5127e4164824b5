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
import hashlib
import io
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distrobust.comm.transport import Transport
from distrobust.errors import CheckpointError

_log = logging.getLogger(__name__)

_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Position:
    """Where a run is: phase number (0 pretrain, 1 train), its name, and steps done in it."""

    ordinal: int
    phase: str
    step: int

    @property
    def directory_name(self) -> str:
        return f"{self.ordinal}-{self.phase}-{self.step:07d}"


def save(
    root: Path,
    position: Position,
    shared: dict[str, Any],
    own: dict[str, Any],
    transport: Transport,
    keep: int,
) -> str | None:
    """Called by every rank. Returns None, or why the checkpoint could not be written (the same on all ranks)."""
    final = root / position.directory_name
    hidden = root / f".{position.directory_name}"
    names = {f"rank-{transport.rank}.pt": own}
    if transport.rank == 0:
        names["shared.pt"] = shared
    row = torch.zeros(1 + 2 * _DIGEST_BYTES, dtype=torch.uint8)
    problem = ""
    try:
        hidden.mkdir(parents=True, exist_ok=True)
        for slot, (name, content) in enumerate(names.items()):
            digest = _write(hidden / name, content)
            start = 1 + slot * _DIGEST_BYTES
            row[start : start + _DIGEST_BYTES] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        row[0] = 1
    except OSError as error:
        problem = f"{error.strerror} ({hidden})"
    rows = transport.gather_rows(row)
    failed = [rank for rank, one in enumerate(rows) if not one[0]]
    published = torch.zeros(1, dtype=torch.uint8)
    if transport.rank == 0 and not failed:
        try:
            _publish(hidden, final, position, rows)
            _prune(root, keep)
            published[0] = 1
        except OSError as error:
            problem = f"{error.strerror} ({final})"
    if transport.rank == 0 and failed:
        shutil.rmtree(hidden, ignore_errors=True)
    if bool(transport.gather_rows(published)[0, 0]):
        return None
    return f"checkpoint {final.name} not written by rank {failed or [0]}: {problem or 'see its log'}"


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


def load(root: Path, transport: Transport) -> Loaded | None:
    """Called by every rank. The newest checkpoint that is whole on all ranks, or None.

    A damaged one is named in the log and the one before is taken. Raises CheckpointError if there are checkpoints but
    none is usable.
    """
    candidates = sorted((p for p in root.glob("[0-9]-*") if p.is_dir()), reverse=True) if root.exists() else []
    damaged: list[Path] = []
    for directory in candidates:
        content, problem = None, ""
        try:
            content = _read(directory, transport)
        except (OSError, ValueError, KeyError) as error:
            problem = str(error)
        whole = torch.tensor([content is not None], dtype=torch.uint8)
        if bool(transport.gather_rows(whole).all()):
            if transport.rank == 0:
                for unusable in damaged:
                    _put_aside(unusable)
            return content
        _log.error("checkpoint %s is damaged (%s); trying the one before", directory, problem or "on another rank")
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


def _write(path: Path, content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getbuffer()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).digest()


def _publish(hidden: Path, final: Path, position: Position, rows: torch.Tensor) -> None:
    digests = {}
    for rank, row in enumerate(rows):
        digests[f"rank-{rank}.pt"] = bytes(row[1 : 1 + _DIGEST_BYTES].tolist()).hex()
    digests["shared.pt"] = bytes(rows[0, 1 + _DIGEST_BYTES :].tolist()).hex()
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
    for old in sorted(root.glob("[0-9]-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for abandoned in root.glob(".[0-9]-*"):
        shutil.rmtree(abandoned, ignore_errors=True)


def _read(directory: Path, transport: Transport) -> Loaded:
    manifest = json.loads((directory / "manifest.json").read_text())
    resized = manifest["num_ranks"] != transport.num_ranks
    ranks = range(manifest["num_ranks"]) if resized else [transport.rank]
    contents = []
    for name in ("shared.pt", *(f"rank-{rank}.pt" for rank in ranks)):
        data = (directory / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest["sha256"][name]:
            raise ValueError(f"{name} does not match its digest")
        contents.append(torch.load(io.BytesIO(data), weights_only=True))
    position = Position(manifest["ordinal"], manifest["phase"], manifest["step"])
    return Loaded(position, contents[0], contents[1:], resized)
