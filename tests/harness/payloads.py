"""Spaces, index sets and values to code: the same for the codec's laws and the message's."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from distrobust.compression.codec import Space
from distrobust.compression.select import num_selected

seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(["normal", "heavy tail", "1e-30 to 1e30", "tiny", "huge", "everything", "zeros", "some zeros"])


def values_of(kind: str, k: int, seed: int) -> Tensor:
    """(k,) float32, finite."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], k)
    made = {
        "normal": lambda: rng.standard_normal(k),
        "heavy tail": lambda: signs * (1 + rng.exponential(1, k)),
        "1e-30 to 1e30": lambda: signs * 10 ** rng.uniform(-30, 30, k),
        "tiny": lambda: signs * 10 ** rng.uniform(-45, -30, k),  # float32 denormals among them
        "huge": lambda: signs * 10 ** rng.uniform(30, 38.5, k),
        "everything": lambda: signs * 10 ** rng.uniform(-45, 38.5, k) * (rng.random(k) < 0.9),
        "zeros": lambda: np.zeros(k),
        "some zeros": lambda: rng.standard_normal(k) * (rng.random(k) < 0.5),
    }[kind]()
    return torch.from_numpy(made.astype(np.float32))


@st.composite
def index_sets(draw: st.DrawFn) -> tuple[int, Tensor]:
    """n and k of its indices, with n also beyond what int32 and float32 can hold."""
    n = draw(st.integers(1, 40) | st.integers(1, 5000) | st.integers(1, 2**40))
    if n <= 40:
        k = draw(st.just(1) | st.just(n) | st.integers(1, n))
        chosen = set(draw(st.permutations(range(n)))[:k])
    else:
        chosen = draw(st.sets(st.sampled_from([0, n - 1]) | st.integers(0, n - 1), min_size=1, max_size=60))
    return n, torch.tensor(sorted(chosen))


@st.composite
def block_lists(draw: st.DrawFn, most: int = 4) -> tuple[list[tuple[int, Tensor]], int]:
    """(size, ascending indices) of up to `most` blocks, each with at least one index, and a seed for their values."""
    seed = draw(seeds)
    rng = np.random.default_rng(seed)
    blocks = []
    for _ in range(draw(st.integers(1, most))):
        n = draw(st.integers(1, 200) | st.integers(500, 3000))
        k = draw(st.integers(1, n) | st.integers(1, max(1, n // 20)))
        pattern = draw(st.sampled_from(["random", "first", "last", "even"]))
        indices = {
            "random": lambda n=n, k=k: np.sort(rng.choice(n, k, replace=False)),
            "first": lambda k=k: np.arange(k),
            "last": lambda n=n, k=k: np.arange(n - k, n),
            "even": lambda n=n, k=k: np.arange(k) * (n // k),
        }[pattern]()
        blocks.append((n, torch.from_numpy(indices.astype(np.int64))))
    return blocks, seed


def joined(blocks: list[tuple[int, Tensor]]) -> tuple[Space, Tensor]:
    """The blocks end to end: their space, and all indices counted from the first block's start."""
    starts = [sum(n for n, _ in blocks[:i]) for i in range(len(blocks))]
    space = Space(sum(n for n, _ in blocks), tuple(len(indices) for _, indices in blocks), tuple(starts))
    return space, torch.cat([indices + start for (_, indices), start in zip(blocks, starts, strict=True)])


def entropy_bits(n: int, k: int) -> float:
    """log2 of the number of ways to choose k of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def resnet50() -> list[int]:
    """Sizes of ResNet-50's 54 matrices, and all its biases and norms as one block: 25,557,032 in 55 blocks."""
    sizes, channels = [64 * 3 * 49], 64
    for width, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(num_blocks):
            sizes += [channels * width, width * width * 9, width * width * 4]
            sizes += [channels * width * 4] if i == 0 else []
            channels = width * 4
    sizes.append(2048 * 1000)
    return [*sizes, 25_557_032 - sum(sizes)]


def resnet50_space(density: float) -> Space:
    sizes = resnet50()
    starts = tuple(sum(sizes[:i]) for i in range(len(sizes)))
    return Space(sum(sizes), tuple(num_selected(n, density) for n in sizes), starts)
