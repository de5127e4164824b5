"""What is trained."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from distrobust.config.section import (
    Count,
    Multiplier,
    Section,
)


class TransformerConfig(Section):
    width: Count = 64
    """Entries of a byte's embedding, and of the network's state for it; a multiple of `heads`."""
    layers: Count = 2
    """Each of attention and a network of twice the width."""
    heads: Count = 4
    """Of attention."""

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> TransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class ModelConfig(Section):
    name: str = "resnet9"
    """A reference network (cnn, resnet9; transformer, which reads texts), `huggingface` (the image classifier in
    `directory`), or `timm:NAME`."""
    transformer: TransformerConfig = TransformerConfig()
    """Its sizes."""
    directory: Path | None = None
    """With config.json and model.safetensors, as save_pretrained writes them: where huggingface's and timm's weights
    come from. Nothing is downloaded."""
    image_size: Count | None = None
    """Pixels a side to which huggingface's and timm's models resize images inside; null: what they were made for where
    they take no other, else images stay as they are."""
    weights: Path | None = None
    """Start from this file (models/*.pt of another run) instead of random weights."""
    channels_last: bool = False
    """Memory format; with bf16 about twice as fast on CPUs."""
    rates: dict[str, Multiplier] = Field(default_factory=dict)
    """During `train`: pattern over parameter names -> what their rate is multiplied with; 0 freezes them, batch-norm
    statistics included, and sends nothing. Of several patterns the last counts."""

    @model_validator(mode="after")
    def _directory_fits_the_name(self) -> ModelConfig:
        if self.name == "huggingface" and self.directory is None and self.weights is None:
            raise ValueError("name huggingface needs a directory with config.json and model.safetensors")
        if not self.is_from_library and (self.directory is not None or self.image_size is not None):
            which = "directory" if self.directory is not None else "image_size"
            raise ValueError(f"{which} goes with name huggingface or timm:NAME, got name {self.name}")
        return self

    @property
    def reads_text(self) -> bool:
        """Whether its inputs are texts; attacks then move their embedding."""
        return self.name == "transformer"

    @property
    def is_from_library(self) -> bool:
        """Whether another library builds it."""
        return self.name == "huggingface" or self.name.startswith("timm:")
