"""The norms in which layers are measured and moved: dual norms and linear minimisation oracles, many tensors at once.

LANTON (Hao et al., 2025, arXiv 2510.14009); for m a matrix of d_out rows and d_in columns (a convolution's kernel as
out x (in k k)), v a vector of d numbers, G = U S V^T:

    norm        of                ||.||                        dual ||.||_*                 argmax <B, O>, ||O|| <= 1
    spectral    hidden matrices   sqrt(d_in / d_out) max(S)    sqrt(d_out / d_in) sum(S)    sqrt(d_out / d_in) U V^T
    sign        embeddings, head  largest |entry|              sum of |entries|             sign(B)
    rms         vectors           ||v||_2 / sqrt(d)            sqrt(d) ||v||_2              v / RMS(v)
    frobenius   anything          ||G||_F                      ||G||_F                      G / ||G||_F

<B, O> = ||B||_* for the O returned, exactly but for `spectral`, whose U V^T is approximated by Newton-Schulz steps with
the coefficients of Polar Express (Amsel et al., 2025, arXiv 2505.16932, algorithm 1): after five steps all singular
values that were above ||G||_F / 1000 lie between 0.84 and 1.13.

The nuclear norm, without an SVD: on a CPU the sum of sqrt(eigenvalues of G G^T) on the short side, which takes less
time than singular values, within 0.11 % times the root of the short side: worst for rank 1, whose zeros round to small
numbers (1.3 % at 256, 2 % at 512, 4.1 % at 1,536 rows), 0.1 % where the rank is full. On other devices, where
eigenvalues are slow, <G, U V^T> with eight steps, within 0.1 %. Both held by tests/optim/test_norms.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["spectral", "sign", "rms", "frobenius"]
NORMS: tuple[Norm, ...] = ("spectral", "sign", "rms", "frobenius")

# a X + b (X X^T) X + c (X X^T)^2 X, step by step: the best odd quintics for singular values in [1e-3, 1]
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01  # rounding may push a singular value over what the next step can take
STEPS, EXACT_STEPS = 5, 8


def as_matrix(tensor: Tensor) -> Tensor:
    """(out, in, *kernel) -> (out, in * kernel), a view where it can be one; a vector as one row."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def dual_norms(norm: Norm, tensors: Sequence[Tensor]) -> Tensor:
    """(len(tensors),) float32: ||G||_* of each. Tensors of the shape of their parameter, any floating dtype."""
    if not tensors:
        return torch.zeros(0)
    if norm == "spectral":
        return _in_batches(tensors, _scaled_nuclear)
    order = 1 if norm == "sign" else 2
    lengths = torch.stack(list(torch._foreach_norm([_float(t) for t in tensors], order)))
    duals: Tensor = lengths * lengths.new_tensor([math.sqrt(t.numel()) if norm == "rms" else 1.0 for t in tensors])
    return duals


def directions(norm: Norm, tensors: Sequence[Tensor]) -> list[Tensor]:
    """argmax <B, O> over ||O|| <= 1 of each, float32, in the tensors' shapes; zero for a tensor of zeros."""
    if norm == "spectral":
        return _each(tensors, _scaled_polar)
    if norm == "sign":
        wide = [_float(t) for t in tensors]
        return [torch.where(torch.isnan(t), t, torch.sign(t)) for t in wide]  # torch's sign of NaN is 0
    duals = dual_norms(norm, tensors)
    scales = [t.numel() if norm == "rms" else 1.0 for t in tensors]  # d / (sqrt(d) ||v||) = 1 / RMS(v)
    lengths = (duals / duals.new_tensor(scales)).unbind()
    return [
        torch.where(length == 0, torch.zeros_like(length), _float(t) / length)
        for t, length in zip(tensors, lengths, strict=True)
    ]


def entry_rms(norm: Norm, tensor: Tensor) -> float:
    """Root mean square of the entries of a direction for this tensor; `spectral`: of one of full rank."""
    if norm == "spectral":
        rows, columns = as_matrix(tensor).shape
        return math.sqrt(min(rows, columns)) / columns
    return 1.0 / math.sqrt(tensor.numel()) if norm == "frobenius" else 1.0


def polar(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """(batch, m, n) float32 -> U V^T of each, approximately: Newton-Schulz on the short side."""
    if matrices.shape[-2] > matrices.shape[-1]:
        return polar(matrices.mT, steps).mT
    largest = matrices.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-35)  # squares must not vanish
    x: Tensor = matrices / largest
    x = x / (_SAFETY * torch.linalg.matrix_norm(x, keepdim=True)).clamp(min=1e-30)
    for i in range(steps):
        a, b, c = _POLAR_EXPRESS[min(i, len(_POLAR_EXPRESS) - 1)]
        if i < len(_POLAR_EXPRESS) - 1:
            a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def nuclear(matrices: Tensor) -> Tensor:
    """(batch, m, n) float32 -> (batch,): the sum of each one's singular values."""
    if matrices.device.type != "cpu":
        return (matrices * polar(matrices, EXACT_STEPS)).sum(dim=(-2, -1))
    scale = matrices.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-30)  # squares must neither vanish nor overflow
    x = matrices / scale
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    finite = torch.isfinite(x).all(dim=-1).all(dim=-1)
    gram = torch.where(finite[:, None, None], x @ x.mT, 0.0)
    # all are kept: one large singular value beside many of a thousandth would lose 34 % without those below n eps of it
    try:
        sums = torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt().sum(dim=-1) * scale[:, 0, 0]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # LAPACK gives up on a matrix now and then
        sums = (matrices * polar(matrices, EXACT_STEPS)).sum(dim=(-2, -1))
    return torch.where(finite, sums, torch.nan)


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32)


def _aspect(matrices: Tensor) -> float:
    """sqrt(d_out / d_in)"""
    return math.sqrt(matrices.shape[-2] / matrices.shape[-1])


def _scaled_nuclear(matrices: Tensor) -> Tensor:
    return nuclear(matrices) * _aspect(matrices)


def _scaled_polar(matrices: Tensor) -> Tensor:
    return polar(matrices) * _aspect(matrices)


def _batches(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of tensors that are matrices of one shape."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(tuple(as_matrix(tensor).shape), []).append(i)
    return list(found.values())


def _each(tensors: Sequence[Tensor], act: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`act` maps (batch, m, n) to the same shape."""
    results: list[Tensor] = list(tensors)
    for places in _batches(tensors):
        acted = act(torch.stack([_float(as_matrix(tensors[i])) for i in places]))
        for i, result in zip(places, acted.unbind(), strict=True):
            results[i] = result.reshape(tensors[i].shape)
    return results


def _in_batches(tensors: Sequence[Tensor], act: Callable[[Tensor], Tensor]) -> Tensor:
    """`act` maps (batch, m, n) to (batch,)."""
    results: list[Tensor] = list(tensors)
    for places in _batches(tensors):
        numbers = act(torch.stack([_float(as_matrix(tensors[i])) for i in places]))
        for i, number in zip(places, numbers.unbind(), strict=True):
            results[i] = number
    return torch.stack(results)
