"""All rounds of a simulation, with looks at the held-out rows and checkpoints in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from distrobust.federated import evaluation
from distrobust.federated.dataset import Rows
from distrobust.federated.simulate import Simulation


def run(
    simulation: Simulation,
    held_out: Rows,
    write: Callable[[dict[str, Any]], None],
    save: Callable[[], None],
    is_stopped: Callable[[], bool],
) -> bool:
    """All rounds, each one's record to `write`; every so often held-out accuracy and a checkpoint by `save`.

    False if it was stopped between two rounds, with a checkpoint.
    """
    config = simulation.config
    shares = simulation.class_shares()
    while simulation.round < config.rounds.number:
        write(simulation.step())
        done = simulation.round
        is_last = done == config.rounds.number
        if done % config.evaluate.every == 0 or is_last:
            scores = simulation.accuracies(held_out)
            accuracies = {name: one.accuracy for name, one in scores.items()}
            own = evaluation.of_clients(scores["clean"], shares)
            quantiles = np.nanquantile(own, evaluation.QUANTILES).tolist()
            event = {"event": "held_out", "time": time.time(), "round": done - 1, "clock_s": simulation.clock_s}
            write({**event, **accuracies, "client_quantiles": quantiles})
            save()
        if is_stopped() and not is_last:
            save()
            return False
    return True
