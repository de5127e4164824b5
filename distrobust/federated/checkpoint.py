"""A simulation between two rounds as one file, every client's state included; the next round goes on to the bit.

RUN/checkpoint.pt is replaced as a whole, and removed when the simulation is over. Loading unpickles tensors and plain
values only. While it is written, everything clients keep is in memory once more.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from distrobust import config as configuration
from distrobust.errors import CheckpointError, ConfigError
from distrobust.federated.settings import SimulateConfig
from distrobust.federated.simulate import Simulation
from distrobust.federated.totals import Totals

NAME = "checkpoint.pt"
_TENSORS = ("shared", "server_residual", "control")
_VECTORS = ("residuals", "velocities", "controls")
_PLAIN = ("round", "clock_s", "message_bytes", "last_seen")


def save(simulation: Simulation, directory: Path) -> None:
    """The file holds either the old or the new state, also if this process dies meanwhile."""
    state: dict[str, Any] = {
        "identity": identity(simulation.config),
        "server": {"x": simulation.server.x, "m": simulation.server.m, "v": simulation.server.v},
        "tensors": {name: getattr(simulation, name) for name in _TENSORS},
        "vectors": {name: getattr(simulation, name).state() for name in _VECTORS},
        "plain": {name: getattr(simulation, name) for name in _PLAIN},
        "patience": (simulation.patience.idle, simulation.patience.nobody),
        "extra": simulation.extra_state(),
        "totals": dataclasses.asdict(simulation.totals),
    }
    temporary = directory / f".{NAME}"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / NAME)


def load(simulation: Simulation, directory: Path) -> bool:
    """Continues from the directory's checkpoint, if it has one. ConfigError if it is another configuration's."""
    path = directory / NAME
    if not path.exists():
        return False
    try:
        state = torch.load(path, weights_only=True)
        theirs = state["identity"]
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: damaged ({reason}); delete it to start afresh") from None
    difference = configuration.first_difference(identity(simulation.config), theirs)
    if difference:
        raise ConfigError(
            f"run.dir {directory} holds an unfinished simulation of another configuration ({difference}); set run.dir "
            f"to a new directory, undo the change, or delete {NAME}"
        )
    for name, value in state["server"].items():
        setattr(simulation.server, name, value)
    for name, value in (*state["tensors"].items(), *state["plain"].items()):
        setattr(simulation, name, value)
    for name, saved in state["vectors"].items():
        getattr(simulation, name).load(saved)
    simulation.patience.idle, simulation.patience.nobody = state["patience"]
    simulation.load_extra_state(state["extra"])
    simulation.totals = Totals(**state["totals"])
    return True


def identity(config: SimulateConfig) -> dict[str, Any]:
    """Everything that changes what a simulation does: not where it is kept, nor how its clients are run."""
    values = config.model_dump(mode="json")
    values["run"].pop("dir")
    for harmless in ("execute", "evaluate", "metrics"):
        values.pop(harmless)
    return values
