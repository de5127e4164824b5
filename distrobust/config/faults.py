"""Faults to inject into a run, to see that it keeps its promises. Never by accident: see train/faults.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distrobust.config.section import Count, Seconds, Section


class FaultConfig(Section):
    kind: Literal[
        "kill_in_forward",
        "kill_in_hook",
        "kill_in_checkpoint",
        "disk_full",
        "upload_fails",
        "slow",
        "hang",
        "flip_bit",
    ]
    """kill_*: SIGKILL to the worker, there; disk_full, upload_fails: writing a checkpoint file fails; slow: the rank's
    forward pass takes `seconds` longer; hang: it never ends; flip_bit: one bit of one parameter changes."""
    rank: Annotated[int, Field(ge=0)]
    """Which worker."""
    step: Annotated[int, Field(ge=0)]
    """Steps of the phase that are done when it strikes; for those of checkpoints, the first one from there on."""
    phase: Literal["pretrain", "train"] = "train"
    """In which phase."""
    times: Count = 1
    """disk_full, upload_fails: attempts to write that fail; slow: steps, also those done again after a restart."""
    seconds: Seconds = 1.0
    """slow only."""
