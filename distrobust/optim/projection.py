"""Random projections of long vectors to a few numbers whose squares add up to the vector's on average.

Coordinate i goes with a random sign into the sum number i mod M (the count sketch of Charikar, Chen and Farach-Colton,
2002): E[sum_j p_j^2] = ||x||^2 over the signs, for any x, and the same for the difference of two vectors that are
projected with the same signs. Variance 2 / M ||x||^4 for a vector spread evenly over the M sums, at most 2 ||x||^4.

Signs are drawn anew for every step. That of coordinate i is a_(i div P) b_(i mod P), P a prime so that no layer's rows
line up with it: one matrix-vector product reads the vector once, and n signs cost sqrt(n). A vector that is a product
of the same shape, x_i = y_(i div P) z_(i mod P), would have a variance up to four times as large; layers have no reason
to be.
"""

from __future__ import annotations

import torch
from torch import Tensor

_P = 65_521  # the largest prime below 2^16


class Projection:
    """To `width` numbers. Equal steps give equal signs on every machine and device."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._signs: tuple[int, Tensor] | None = None

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """(n,) float32 -> (width,) float32."""
        n = x.numel()
        columns, row_signs = self._of(step, x.device).split(_P)
        if n <= _P:
            signed = x * columns[:n]
        else:
            rows, rest = divmod(n, _P)
            folded = row_signs[:rows] @ x[: rows * _P].view(rows, _P)
            folded[:rest] += row_signs[rows] * x[rows * _P :]
            signed = folded * columns
        padded = torch.nn.functional.pad(signed, (0, -signed.numel() % self.width))
        return padded.view(-1, self.width).sum(dim=0)

    def _of(self, step: int, device: torch.device) -> Tensor:
        if self._signs is None or self._signs[0] != step or self._signs[1].device != device:
            generator = torch.Generator().manual_seed(step)
            drawn = torch.randint(0, 2, (2 * _P,), generator=generator, dtype=torch.int8, device="cpu").to(device)
            self._signs = (step, drawn.to(torch.float32).mul_(2.0).sub_(1.0))
        return self._signs[1]
