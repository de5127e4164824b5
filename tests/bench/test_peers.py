"""The peers of the step benchmark do what their papers say."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from harness.ranks import Rank, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks/peers.py"
    spec = importlib.util.spec_from_file_location("benchmarks_peers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peers = _load()
pytestmark = pytest.mark.ranks


class Given(nn.Module):
    """A matrix and a bias whose gradients are the inputs."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(n, m))
        self.bias = nn.Parameter(torch.zeros(m))

    def forward(self, matrix: Tensor, bias: Tensor) -> Tensor:
        return (self.matrix * matrix).sum() + (self.bias * bias).sum()


def _gradients(steps: int, rank: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(steps, n, m, generator=generator) ** 3, torch.randn(steps, m, generator=generator)


def _train(
    install: Callable[..., Any], options: dict[str, Any], matrices: list[Tensor], biases: list[Tensor]
) -> list[list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]]:
    """Per rank and step: the gradients of matrix and bias after the hook."""
    n, m = matrices[0].shape[1:]

    def body(rank: Rank) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        model = DistributedDataParallel(Given(n, m), process_group=rank.group, gradient_as_bucket_view=True)
        install(model, **options)
        seen = []
        for matrix, bias in zip(matrices[rank.rank], biases[rank.rank], strict=True):
            model.zero_grad(set_to_none=True)
            model(matrix, bias).backward()
            module = model.module
            seen.append((module.matrix.grad.numpy().copy(), module.bias.grad.numpy().copy()))
        return seen

    return run_ranks(len(matrices), body)


def _select(magnitude: np.ndarray[Any, Any], k: int, density: float) -> np.ndarray[Any, Any]:
    """Deep Gradient Compression's hierarchical selection, from the paper: sampled threshold, then the top k."""
    n = magnitude.size
    wanted = max(0.01 * n, 2 / density)
    sample = np.sort(magnitude[:: max(1, int(n // wanted))])[::-1]
    threshold = sample[int(np.ceil(sample.size * density)) - 1]
    while (magnitude >= threshold).sum() < 0.8 * k:
        threshold *= 0.8
    above = np.flatnonzero(magnitude >= threshold)
    return above[np.argsort(-magnitude[above])][:k]


def test_plain_dgc_agrees_with_the_paper_in_numpy() -> None:
    """u = m u + g; v = v + u; send the k largest of v in fp16; clear u and v there. Bias: mean, then momentum.

    1e-6 relative: sums of a few float32 in another order; selections agree unless two magnitudes differ by less.
    """
    n, m, steps, density, momentum = 40, 50, 6, 0.05, 0.9
    inputs = [_gradients(steps, rank, n, m) for rank in range(3)]
    got = _train(peers.dgc, {"density": density, "momentum": momentum}, [g for g, _ in inputs], [b for _, b in inputs])
    k = int(np.ceil(n * m * density))
    u, v = np.zeros((3, n * m), np.float32), np.zeros((3, n * m), np.float32)
    bias = np.zeros(m, np.float32)
    for step in range(steps):
        mean = np.zeros(n * m, np.float32)
        for rank, (matrices, _) in enumerate(inputs):
            u[rank] = np.float32(momentum) * u[rank] + matrices[step].numpy().reshape(-1)
            v[rank] += u[rank]
            sent = _select(np.abs(v[rank]), k, density)
            assert 0.8 * k <= sent.size <= k
            mean[sent] += v[rank][sent].astype(np.float16).astype(np.float32) / 3
            u[rank][sent] = 0
            v[rank][sent] = 0
        bias = np.float32(momentum) * bias + np.mean([b[step].numpy() for _, b in inputs], axis=0, dtype=np.float32)
        for rank in range(3):
            matrix_grad, bias_grad = got[rank][step]
            np.testing.assert_allclose(matrix_grad.reshape(-1), mean, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(bias_grad, bias, rtol=1e-5, atol=1e-6)


def test_plain_dgc_counts_what_it_sends() -> None:
    def body(rank: Rank) -> int:
        model = DistributedDataParallel(Given(40, 50), process_group=rank.group, gradient_as_bucket_view=True)
        state = peers.dgc(model, 0.0505)  # k = 101: the message is filled up to a multiple of four
        model(torch.randn(40, 50), torch.randn(50)).backward()
        return int(state.sent_bytes)

    assert run_ranks(2, body) == [(6 * 101 + 2) + 4 * 50] * 2


@pytest.mark.parametrize("rank", [1, 2])
def test_power_sgd_reconstructs_a_matrix_of_its_rank_in_one_step(rank: int) -> None:
    """The mean of the ranks' matrices has rank 2 at most; with rank 1 both ranks have the same rank-1 matrix."""
    generator = torch.Generator().manual_seed(5)
    n, m = 30, 20
    columns = [torch.randn(n, generator=generator) for _ in range(2)]
    rows = [torch.randn(m, generator=generator) for _ in range(2)]
    which = [0, rank - 1]  # which product each worker has
    matrices = [torch.outer(columns[i], rows[i]).expand(2, n, m) for i in which]
    biases = [torch.full((2, m), float(worker)) for worker in range(2)]
    mean = (matrices[0][0] + matrices[1][0]).numpy() / 2
    for seen in _train(peers.power_sgd, {"rank": rank}, matrices, biases):
        np.testing.assert_allclose(seen[0][0], mean, rtol=1e-4, atol=1e-4)  # float32, n m products of order 1
        np.testing.assert_allclose(seen[0][1], np.full(m, 0.5))


def test_power_sgd_loses_nothing_over_time() -> None:
    """Error feedback: for a constant gradient what was applied in T steps tends to T times its mean, error O(1) / T."""
    generator = torch.Generator().manual_seed(1)
    steps, n, m = 150, 12, 10
    matrices = [torch.randn(n, m, generator=generator).expand(steps, n, m) for _ in range(2)]
    biases = [torch.zeros(steps, m)] * 2
    mean = (matrices[0][0] + matrices[1][0]).numpy() / 2
    (first, second) = _train(peers.power_sgd, {"rank": 1}, matrices, biases)
    applied = sum(matrix for matrix, _ in first) / steps
    # the error of rank 1 on a 12 x 10 Gaussian matrix settles at about its rank times its norm: a tenth after 150 steps
    assert np.linalg.norm(applied - mean) < 0.15 * np.linalg.norm(mean)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
