"""One phase of training: its length, optimizer and learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distrobust.config.section import (
    Count,
    Positive,
    Section,
    Share,
)


class ScheduleConfig(Section):
    name: Literal["one_cycle", "slow_start_fast_decay", "cosine", "constant"] = "one_cycle"
    """Shape over the phase; slow_start_fast_decay is the adversarial fine-tuning paper's."""
    peak: Positive = 0.1
    """Highest learning rate."""
    warmup: Share = 0.2
    """Share of the phase until the peak."""
    floor: Share = 0.01
    """First rate, as a share of the peak."""
    tuned_for: Count | None = None
    """Global batch size the peak was found at; at another one it is scaled, and the factor logged. null: as it is."""
    scaling: Literal["linear", "sqrt"] = "linear"
    """With tuned_for: linear for SGD, sqrt for adaptive optimizers."""


class AccuracyGradientConfig(Section):
    window: Count = 5
    """Epochs over which held-out accuracy is averaged; no cut before more than these have passed."""
    patience: Count = 5
    """Epochs between two cuts, at least."""
    threshold: Annotated[float, Field(gt=-1.0, lt=1.0)] = 0.005
    """Cut when the average rises by less than this from one epoch to the next; a share, 0.005 is half a point."""
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    """What the rate is multiplied with."""
    floor: Positive = 1e-6
    """Lowest rate."""


class PhaseConfig(Section):
    epochs: Count = 3
    """Passes over the training rows; rows that fill no batch differ from epoch to epoch."""
    batch_size: Count = 256
    """Over all workers."""
    optimizer: Literal["sgd", "adamw", "lanton"] = "sgd"
    """sgd: the only one whose momentum goes into the residual, and that can step ahead; adamw and lanton keep their own
    and want a peak of about 0.01."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the phase."""
    accuracy_gradient: AccuracyGradientConfig | None = None
    """Cut the rate when held-out accuracy (robust, if there is an attack) stops rising; null: never."""
    gradient_noise: Positive | None = None
    """Annealed Gaussian noise on the mean gradient: variance this / (1 + step)^0.55 a coordinate; null: none."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Of SGD, where under compression it is momentum correction, in the residual; of LANTON; beta1 of AdamW."""
    nesterov: bool = False
    """Nesterov's form of it."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-4
    """Of SGD: coupled (L2), added to the local gradient before it is accumulated; of the others: decoupled."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of the cross-entropy."""
    accumulate: Count = 1
    """Micro-batches in which a rank takes its share of a step, one exchange for all; less memory, the same examples."""
    average: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of an exponential moving average of the weights, which the phase then evaluates and leaves; null: none."""
    patience: Count | None = None
    """Stop after so many epochs without a better held-out accuracy (robust, if there is an attack); null: never."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast in the forward passes, weights and residuals stay fp32."""
    max_skipped_steps: Count = 10
    """Give up after this many non-finite steps in a row."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> PhaseConfig:
        if self.nesterov and not (self.momentum and self.optimizer == "sgd"):
            got = f"got {self.optimizer}, momentum {self.momentum:g}"
            raise ValueError(f"nesterov needs optimizer sgd and a momentum above 0; {got}")
        return self


class NoiseConfig(Section):
    alpha: Positive = 0.1
    """Noise at which a layer's rate begins to fall: a difference of gradients in the Frobenius norm, with optimizer
    lanton in the dual of the layer's norm."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Average of the noise over time."""
