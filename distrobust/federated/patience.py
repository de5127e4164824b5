"""When there is no point in going on: rounds in a row without one update."""

from __future__ import annotations

import numpy as np

from distrobust.errors import DivergedError
from distrobust.federated.settings import SimulateConfig
from distrobust.federated.timeline import Course
from distrobust.federated.totals import Round

PATIENCE = 10  # rounds in a row without one update
NOBODY = 10_000  # rounds in a row in which nobody could be reached: a week of retries once a minute


class Patience:
    """Counts such rounds."""

    def __init__(self, config: SimulateConfig) -> None:
        self._config = config
        self.idle = self.nobody = 0

    def look(self, number: int, num_started: int, course: Course, this: Round) -> None:
        """At the end of a round; raises DivergedError, with the most likely reason, when it is over."""
        self.idle = 0 if this.losses else self.idle + (num_started > 0)
        self.nobody = 0 if num_started else self.nobody + 1
        if self.idle == PATIENCE or self.nobody == NOBODY:
            rounds = PATIENCE if num_started else NOBODY
            reason = self._reason(num_started, course, this)
            raise DivergedError(f"round {number}: no update for {rounds} rounds in a row: {reason}")

    def _reason(self, num_started: int, course: Course, this: Round) -> str:
        deadline_s = self._config.rounds.deadline_s
        if this.nonfinite:
            return "all that arrived were not finite; lower local.rate"
        if not num_started:
            return "no client could be reached; raise availability.share"
        if deadline_s is not None and np.isfinite(course.fastest_s):
            return (
                f"rounds.deadline_s is {deadline_s:g}, and the fastest client of the last round would have needed "
                f"{course.fastest_s:.4g} s; raise it to more than that"
            )
        return "every client was lost in its upload; lower links.drop_out"
