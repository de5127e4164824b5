"""A small GPT on characters, for benchmarks: pre-norm blocks, learned positions, no dropout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """(B, T, width) -> the same."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return result


class GPT(nn.Module):
    """(B, T) int64 -> (B, T, vocabulary) logits. 0.82 M parameters for 65 characters by default."""

    def __init__(self, vocabulary: int, length: int = 64, width: int = 128, depth: int = 4, num_heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


class Text:
    """Characters as numbers; the last tenth is held out."""

    def __init__(self, path: Path, length: int = 64) -> None:
        characters = path.read_text()
        alphabet = {c: i for i, c in enumerate(sorted(set(characters)))}
        text = torch.tensor([alphabet[c] for c in characters])
        self.vocabulary, self.length = len(alphabet), length
        split = len(text) * 9 // 10
        self.train, self.held_out = text[:split], text[split:]

    def rows(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, length + 1) from random places of the training text."""
        starts = torch.randint(len(self.train) - self.length - 1, (count,), generator=generator)
        return torch.stack([self.train[s : s + self.length + 1] for s in starts.tolist()])

    def held_out_rows(self, count: int) -> Tensor:
        """(count, length + 1), evenly spaced over the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - self.length - 1, count).long().tolist()
        return torch.stack([self.held_out[s : s + self.length + 1] for s in starts])


def loss_of(net: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy of every next character; rows (B, T + 1)."""
    return nn.functional.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
