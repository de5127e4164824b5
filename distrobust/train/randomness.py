"""Random generators as a function of where a run is, so that there is no generator state to save."""

from __future__ import annotations

import numpy as np
import torch


def seed_of(*counters: int) -> int:
    """A well-mixed 63-bit seed of non-negative counters, such as (seed, phase, step, rank)."""
    return int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> 1)


def generator_at(device: torch.device, *counters: int) -> torch.Generator:
    """A fresh generator on `device`, seeded by the counters alone."""
    return torch.Generator(device).manual_seed(seed_of(*counters))
