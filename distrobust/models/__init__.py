"""Image classifiers with the normalisation inside: float images in [0, 1], (B, C, H, W) -> logits (B, num_classes).

And one classifier of texts, build_transformer: bytes (B, L) -> logits.

build          a reference network (cnn, resnet9, ...) by name
from_directory a Hugging Face or timm model whose weights lie in a directory; nothing is ever downloaded
rebuild        the same model again from its description in a model file, without that directory
load_weights   parameters and buffers by name, all or nothing

Only huggingface.py imports transformers, only timm.py timm, and only when such a model is asked for.
"""

from distrobust.models.adapted import Adapted, freeze_unused_
from distrobust.models.library import TIMM, FromDirectory, from_directory, rebuild
from distrobust.models.reference import MIN_SIDE, MODELS, Normalise, build
from distrobust.models.transformer import TRANSFORMER, Transformer, build_transformer
from distrobust.models.weights import load_weights

__all__ = [
    "MIN_SIDE",
    "MODELS",
    "TIMM",
    "TRANSFORMER",
    "Adapted",
    "FromDirectory",
    "Normalise",
    "Transformer",
    "build",
    "build_transformer",
    "freeze_unused_",
    "from_directory",
    "load_weights",
    "rebuild",
]
