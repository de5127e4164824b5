"""Tiny Hugging Face classifiers with random weights, written to a directory as their users do."""

import json
from pathlib import Path
from typing import Any


def write_resnet(directory: Path, num_classes: int, *, num_channels: int = 3, **preprocessor: Any) -> Path:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=num_channels,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=num_classes,
    )
    return _write(directory, ResNetForImageClassification(config), preprocessor)


def write_vit(directory: Path, num_classes: int, *, headless: bool = False, **preprocessor: Any) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=num_classes,
    )
    return _write(directory, ViTModel(config) if headless else ViTForImageClassification(config), preprocessor)


def _write(directory: Path, model: Any, preprocessor: dict[str, Any]) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(directory)
    if preprocessor:
        (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory
