"""A held-out part of a split: which rows are trained on and which are kept for validation.

By row and from a seed alone, so that they are the same rows for any number of ranks, any row-group size and
after any restart. A selection is four numbers; its rows are computed where they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrobust.data.source import Source
from distrobust.errors import ConfigError

HELD_OUT_STREAM = 1  # separates these random numbers from those of the sharding under the same seed


@dataclass(frozen=True)
class Selection:
    """One of the two parts `split_held_out` makes."""

    total_rows: int  #: of the split
    num_held_out: int
    seed: int
    held_out: bool  #: this is the held-out part

    @property
    def num_rows(self) -> int:
        return self.num_held_out if self.held_out else self.total_rows - self.num_held_out

    def rows(self) -> NDArray[np.int64]:
        """(num_rows,) the selected rows, ascending."""
        order = np.random.default_rng([self.seed, HELD_OUT_STREAM]).permutation(self.total_rows)
        chosen = order[: self.num_held_out] if self.held_out else order[self.num_held_out :]
        return np.sort(chosen)


def split_held_out(source: Source, fraction: float, seed: int) -> tuple[Selection, Selection]:
    """(train, held out): a random `fraction` (of all rows, rounded to the nearest row) is held out.

    Raises ConfigError when fraction is not between 0 and 1 (exclusive), or leaves one part without rows.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"held-out fraction is {fraction}, wanted more than 0 and less than 1")
    num_held_out = round(fraction * source.total_rows)
    if not 0 < num_held_out < source.total_rows:
        raise ConfigError(
            f"held-out fraction {fraction} of {source.total_rows} rows is {num_held_out} rows, "
            "wanted at least one row on either side; choose another fraction"
        )
    train, held_out = (Selection(source.total_rows, num_held_out, seed, part) for part in (False, True))
    return train, held_out
