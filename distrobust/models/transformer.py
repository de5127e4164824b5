"""A small text classifier over bytes: a transformer whose embedding can be moved by an attack.

    x = norm(E[bytes])              no two bytes differ in length: an embedding cannot grow away from a budget eps
    h = x + delta + P               P: learned positions, at first the sinusoids of Vaswani et al. 2017
    h = h + attention(norm(h)),  h = h + mlp(norm(h))       each layer, pre-norm
    logits = head(mean of norm(h) over the bytes of the text)

norm in the first line has no weights: every entry of x has variance 1, which is what eps is measured in (Miyato et al.
2017, section 3, normalise for the same reason). Padding, byte 0, is attended to by nothing and left out of the mean:
its gradient is exactly zero. Attention is written out, because its fused backward pass is not deterministic on CUDA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrobust.errors import ModelError
from distrobust.models.reference import seeded

TRANSFORMER = "transformer"
PAD = 0
NUM_BYTES = 256


class Transformer(nn.Module):
    """tokens (B, L) uint8, L <= length -> logits (B, num_classes); delta (B, L, D): added to what `embed` returns."""

    def __init__(self, num_classes: int, length: int, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, width)
        self.positions = nn.Parameter(sinusoids(length, width))
        self.num_layers = num_layers
        for number in range(1, num_layers + 1):
            self.add_module(f"layer{number}", Layer(width, num_heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, L, D): a point for each byte, of mean 0 and variance 1; 0 at padding."""
        x = F.layer_norm(self.embedding(tokens.long()), self.embedding.weight.shape[1:])
        return x * self.is_real(tokens)[:, :, None]

    def is_real(self, tokens: Tensor) -> Tensor:
        """(B, L) bool, False at padding."""
        return tokens != PAD

    def forward(self, tokens: Tensor, delta: Tensor | None = None) -> Tensor:
        real = self.is_real(tokens)
        h = self.embed(tokens)
        if delta is not None:
            h = h + delta
        h = h + self.positions[: tokens.shape[1]]
        for number in range(1, self.num_layers + 1):
            h = self.get_submodule(f"layer{number}")(h, real)
        h = self.norm(h) * real[:, :, None]
        logits: Tensor = self.head(h.sum(dim=1) / real.sum(dim=1, keepdim=True).clamp_min(1))
        return logits


class Layer(nn.Module):
    """Attention among the bytes of a text, then a network of twice the width on each; both added to what came in."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)  # queries, keys, values
        self.joined = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, h: Tensor, real: Tensor) -> Tensor:
        batch, length, width = h.shape
        heads = self.attention(self.norm1(h)).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, L, D / heads)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        # the smallest number, not -inf: a text of nothing but padding has finite logits
        scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
        h = h + self.joined((scores.softmax(dim=3) @ v).transpose(1, 2).reshape(batch, length, width))
        moved: Tensor = h + self.down(F.gelu(self.up(self.norm2(h))))
        return moved


def sinusoids(length: int, width: int) -> Tensor:
    """(length, width): sines, then cosines, of wavelengths from 2 pi to 20,000 pi positions."""
    rates = torch.exp(torch.arange((width + 1) // 2) * (-math.log(10_000) * 2 / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def build_transformer(
    num_classes: int, length: int, width: int, num_layers: int, num_heads: int, *, seed: int | None = None
) -> Transformer:
    """In training mode, float32, on the CPU. length: of texts, in bytes; seed: as for `build`.

    Raises ModelError for impossible sizes.
    """
    if num_classes < 2:
        raise ModelError(f"model {TRANSFORMER}: num_classes is {num_classes}, needs at least 2")
    if min(length, width, num_layers, num_heads) < 1 or width % num_heads:
        raise ModelError(
            f"model {TRANSFORMER}: length {length}, width {width}, {num_layers} layers, {num_heads} heads; "
            "all must be at least 1, and width a multiple of heads"
        )
    with seeded(seed):
        return Transformer(num_classes, length, width, num_layers, num_heads)
