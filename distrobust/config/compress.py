"""What is sent instead of a gradient."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distrobust.config.section import (
    Density,
    Positive,
    Section,
    Share,
)


class CompressConfig(Section):
    density: Density | Literal["auto"] = 0.01
    """Fraction of coordinates sent per step; 1: dense all-reduce with the momentum in the hook; auto: by a budget."""
    fewer_bytes: Positive | None = None
    """With density auto: how many times fewer bytes than dense over the whole phase, warm-up included."""
    exchange_s: Positive | None = None
    """With density auto instead: seconds a step may spend sending, on the link as measured at the start."""
    warmup: Share | None = None
    """Share of the phase spent on the paper's ladder of densities; null: 0.2, or none with step_ahead."""
    ladder: tuple[Density, ...] = (0.25, 0.0625, 0.015625, 0.004, 0.001)
    """The ladder itself; rungs at or below `density` are left out."""
    final_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the end that are sent at final_density, because what is in the residual when a run ends is lost."""
    final_density: Density = 1.0
    """Of the last steps."""
    step_ahead: bool = False
    """Compute each worker's gradient where its own unsent update will lead (step-ahead error feedback)."""
    values: Literal["fp32", "fp16", "bf16", "int8", "4bit", "2bit", "sign"] = "4bit"
    """On the wire; the rounding error stays in the residual."""
    indices: Literal["elias_fano", "rice"] = "elias_fano"
    """On the wire; rice is 0.5 bit shorter and may leave out a few of the smallest coordinates."""
    exchange: Literal["auto", "all_gather", "sharded", "hierarchical"] = "auto"
    """all_gather: every worker's message to all; sharded: through owners of parts, about 2 messages a worker;
    hierarchical: dense inside a machine, one of these between machines; auto: whichever sends least."""
    selector: Literal["sampled", "exact"] = "sampled"
    """Both select the same coordinates."""
    masking: bool | None = None
    """Momentum factor masking; null: on, or off with step_ahead."""
    clip: Positive | None = None
    """Threshold of the global gradient norm, applied per tensor to clip / sqrt(workers)."""
    fuse_below: Annotated[int, Field(ge=0)] = 2048
    """Tensors with fewer elements (biases, norms) are selected together."""

    @model_validator(mode="after")
    def _budget(self) -> CompressConfig:
        budgets = sum(value is not None for value in (self.fewer_bytes, self.exchange_s))
        if budgets != (self.density == "auto"):
            raise ValueError(
                "density auto goes with one of fewer_bytes and exchange_s, and a number with neither; "
                f"got density {self.density}, fewer_bytes {self.fewer_bytes}, exchange_s {self.exchange_s}"
            )
        return self
