"""Norms, their duals and their oracles."""

import math

import pytest
import torch
from torch import Tensor

from distrobust.optim.norms import NORMS, Norm, as_matrix, directions, dual_norms, nuclear, polar

SHAPES = {
    "spectral": [(6, 20), (20, 6), (8, 3, 3, 3), (5, 5), (1, 7)],
    "sign": [(11, 4), (3,)],
    "rms": [(9,), (1,)],
    "frobenius": [(4, 5), (6,), (2, 3, 3, 3)],
}
# of <B, O> and of ||O||: five Newton-Schulz steps leave singular values between 0.84 and 1.13; the others are exact
SLACK = {"spectral": 0.16, "sign": 1e-6, "rms": 1e-6, "frobenius": 1e-6}


def primal(norm: Norm, tensor: Tensor) -> float:
    """From the table of norms.py, by singular values in float64."""
    x = tensor.double()
    if norm == "spectral":
        m = as_matrix(x)
        return float(math.sqrt(m.shape[1] / m.shape[0]) * torch.linalg.svdvals(m).max())
    return float({"sign": x.abs().max(), "rms": x.square().mean().sqrt(), "frobenius": x.norm()}[norm])


def samples(norm: Norm, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES[norm]]


@pytest.mark.parametrize("norm", NORMS)
def test_a_direction_has_norm_one_and_attains_the_dual_norm(norm: Norm) -> None:
    tensors = samples(norm)
    for b, o, dual in zip(tensors, directions(norm, tensors), dual_norms(norm, tensors), strict=True):
        assert o.shape == b.shape
        assert primal(norm, o) == pytest.approx(1.0, rel=SLACK[norm])
        assert float((b * o).sum()) == pytest.approx(float(dual), rel=SLACK[norm])


@pytest.mark.parametrize("norm", NORMS)
def test_no_direction_gains_more_than_the_dual_norm(norm: Norm) -> None:
    """Hoelder: <A, B> <= ||A|| ||B||_*, with equality for the oracle's; float32 sums of at most 216 terms."""
    for b, dual, a in zip(samples(norm), dual_norms(norm, samples(norm)), samples(norm, seed=1), strict=True):
        assert abs(float((a * b).sum())) <= primal(norm, a) * float(dual) * (1 + 1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_many_at_once_is_each_by_itself(norm: Norm) -> None:
    tensors = samples(norm) + samples(norm, seed=2)
    together, duals = directions(norm, tensors), dual_norms(norm, tensors)
    for tensor, o, dual in zip(tensors, together, duals, strict=True):
        # batched products may be summed in another order
        torch.testing.assert_close(o, directions(norm, [tensor])[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dual, dual_norms(norm, [tensor])[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_directions_do_not_depend_on_the_scale(norm: Norm, scale: float) -> None:
    tensors = samples(norm)
    scaled = [tensor * scale for tensor in tensors]
    for ours, theirs in zip(directions(norm, scaled), directions(norm, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dual_norms(norm, scaled), dual_norms(norm, tensors) * scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_has_no_direction(norm: Norm) -> None:
    zeros = [torch.zeros(shape) for shape in SHAPES[norm]]
    assert all(not o.any() for o in directions(norm, zeros))
    assert not dual_norms(norm, zeros).any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_nan_is_seen(norm: Norm) -> None:
    tensor = samples(norm)[0]
    tensor.view(-1)[1] = math.nan
    assert not math.isfinite(float(dual_norms(norm, [tensor])[0]))


@pytest.mark.parametrize("norm", NORMS)
def test_any_floating_dtype_and_memory_format(norm: Norm) -> None:
    tensors = samples(norm)
    narrow = [tensor.to(torch.bfloat16) for tensor in tensors]
    for ours, theirs in zip(directions(norm, narrow), directions(norm, [t.float() for t in narrow]), strict=True):
        assert torch.equal(ours, theirs)
    if norm == "spectral":
        image = tensors[2]
        last = image.contiguous(memory_format=torch.channels_last)
        assert torch.equal(directions(norm, [last])[0], directions(norm, [image])[0])


def spectra() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for m, n in ((64, 576), (512, 128), (10, 128), (300, 300)):
        noise = torch.randn(m, n, generator=generator)
        u, s, v = torch.linalg.svd(noise, full_matrices=False)
        made[f"{m}x{n} noise"] = noise
        made[f"{m}x{n} decaying"] = u @ torch.diag(torch.logspace(0, -3, len(s))) @ v
        made[f"{m}x{n} rank 4"] = torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator)
    for m, n in ((256, 256), (512, 1024)):
        made[f"{m}x{n} rank 1"] = torch.rand(m, 1, generator=generator) @ torch.rand(1, n, generator=generator)
        made[f"{m}x{n} noise"] = noise = torch.randn(m, n, generator=generator)
        u, _, v = torch.linalg.svd(noise, full_matrices=False)
        made[f"{m}x{n} one large"] = u @ torch.diag(torch.tensor([1.0] + [1e-3] * (m - 1))) @ v
    return made


@pytest.mark.parametrize("name", spectra())
def test_nuclear_norms_without_singular_values(name: str) -> None:
    """Within what norms.py states by eigenvalues, 0.1 % by eight Newton-Schulz steps."""
    matrix = spectra()[name]
    exact = float(torch.linalg.svdvals(matrix.double()).sum())
    by_eigenvalues = 0.001 if name.endswith(("noise", "one large")) else 0.0011 * math.sqrt(min(matrix.shape))
    assert float(nuclear(matrix[None])) == pytest.approx(exact, rel=by_eigenvalues)
    assert float((matrix * polar(matrix[None], 8)[0]).sum()) == pytest.approx(exact, rel=0.001)


@pytest.mark.parametrize("name", spectra())
def test_five_steps_bring_singular_values_near_one(name: str) -> None:
    matrix = spectra()[name].double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    mapped = (u.mT @ polar(matrix.float()[None])[0].double() @ v.mT).diagonal()
    large = mapped[s > 1e-3 * matrix.norm()]
    assert 0.84 <= float(large.min()) <= float(large.max()) <= 1.13


@pytest.mark.parametrize("exponent", range(-45, -18, 3))
def test_a_momentum_that_fades_away_ends_in_no_direction_not_in_nan(exponent: int) -> None:
    """As after a branch fell out of use: 0.95^n of what it was."""
    for o in directions("spectral", [tensor * 10.0**exponent for tensor in samples("spectral")]):
        assert bool(torch.isfinite(o).all())
        assert primal("spectral", o) <= 1.13


@pytest.mark.parametrize("norm", NORMS)
def test_a_nan_does_not_become_a_direction_of_nothing(norm: Norm) -> None:
    tensor = samples(norm)[0]
    tensor.view(-1)[1] = math.nan
    assert bool(torch.isnan(directions(norm, [tensor])[0]).any())


def test_a_matrix_whose_eigenvalues_do_not_converge_has_a_norm_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(_: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", give_up)
    g = torch.randn(2, 12, 30, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(g).sum(dim=-1)
    torch.testing.assert_close(nuclear(g), expected, rtol=1e-3, atol=0)
