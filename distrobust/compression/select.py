"""Which coordinates leave: the k of largest magnitude, exactly k of them, in ascending order of index.

Deep Gradient Compression (Lin et al., ICLR 2018), section 3.1: "we sample 0.1 % to 1 % of the gradients and perform
top-k selection on the samples to estimate the threshold ... if the number of gradients exceeding the threshold is
far more than expected, a precise threshold is calculated from the already-selected gradients".

Difference from the paper: its result may hold more or fewer than k coordinates. Here the sampled threshold only
narrows the candidates; the k largest of them are then taken exactly, and when the sample promised too few the threshold
is lowered. Both selectors therefore return the *same* set, and a message's length is known before it is made.
Ties at the threshold go to the lowest index, so the set is a function of the values alone; on a GPU torch.topk
decides ties, the same way for the same values on the same kind of device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_Floats = npt.NDArray[np.float32]
_Indices = npt.NDArray[np.int64]

SAMPLE_HITS = 64  # survivors wanted in the sample: relative error of the threshold's rank is about 1/sqrt(64)
SAMPLE_STRIDE = 97  # prime, so that it does not beat with the period of a layer's rows
SLACK = 1.25  # aim this far below the threshold, so that one pass is nearly always enough


def num_selected(n: int, density: float) -> int:
    """How many of n coordinates are sent at a density in (0, 1]: at least one, rounded to nearest."""
    return max(1, min(n, int(n * density + 0.5)))


def exact_top_k(values: Tensor, k: int) -> Tensor:
    """Indices (k,) int64, ascending, of the k largest magnitudes in `values` (n,) float32 without NaN."""
    if values.device.type != "cpu":
        return torch.topk(values.abs(), k, sorted=False).indices.sort().values
    return torch.from_numpy(exact(np.abs(values.numpy()), k))


def sample_stride(n: int, k: int) -> int:
    """Stride of a sample in which the k largest of n have at least SAMPLE_HITS members; below 2: not worth it."""
    return min(SAMPLE_STRIDE, k // SAMPLE_HITS, n // k)


def sampled_threshold(sample: _Floats, k: int, stride: int) -> float:
    """A magnitude that a little more than k of the values reach of which `sample` holds every stride-th.

    Reorders it.
    """
    rank = min(int(SLACK * k / stride), len(sample) - 1)
    sample.partition(len(sample) - 1 - rank)
    return float(sample[len(sample) - 1 - rank])


def sampled_top_k(values: Tensor, k: int) -> Tensor:
    """The same set as `exact_top_k`, with a threshold from a strided sample in front of the exact step."""
    stride = sample_stride(values.numel(), k)
    if stride < 2:
        return exact_top_k(values, k)
    if values.device.type != "cpu":
        return _sampled_on_device(values, k, stride)
    magnitude = np.abs(values.numpy())
    survivors = np.flatnonzero(magnitude >= sampled_threshold(magnitude[::stride].copy(), k, stride))
    if len(survivors) >= k:
        return torch.from_numpy(survivors[exact(magnitude[survivors], k)])
    return torch.from_numpy(exact(magnitude, k))


def _sampled_on_device(values: Tensor, k: int, stride: int) -> Tensor:
    magnitude = values.abs()
    sample = magnitude[::stride].sort(descending=True).values
    rank = int(SLACK * k / stride)
    while rank < sample.numel():
        survivors = torch.nonzero(magnitude >= sample[rank]).view(-1)
        if survivors.numel() >= k:
            return survivors[exact_top_k(magnitude[survivors], k)]
        rank *= 2
    return exact_top_k(values, k)


def exact(magnitude: _Floats, k: int) -> _Indices:
    """Ascending positions (k,) of the k largest of `magnitude` (n,), without NaN."""
    n = len(magnitude)
    if k == n:
        return np.arange(n)
    # the value by partition and the places by comparison, so that ties are ours to decide
    threshold = np.partition(magnitude, n - k)[n - k]
    chosen = np.flatnonzero(magnitude >= threshold)
    surplus = len(chosen) - k
    if surplus:
        ties = np.flatnonzero(magnitude[chosen] == threshold)
        chosen = np.delete(chosen, ties[len(ties) - surplus :])
    return chosen


Selector = Callable[[Tensor, int], Tensor]
SELECTORS: dict[str, Selector] = {"exact": exact_top_k, "sampled": sampled_top_k}
