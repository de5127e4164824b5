"""Projections to a few numbers."""

import math

import pytest
import torch

from distrobust.optim.projection import Projection


@pytest.mark.parametrize("n", [3, 1_000, 65_521, 65_522, 200_000])
def test_squares_add_up_to_the_vectors_on_average(n: int) -> None:
    """Relative variance of one: at most 2 / width for a vector without pattern (a little more for n = 3, where a sum
    may hold one coordinate, which is exact). 400 draws of 4 numbers: standard deviation 0.035; five of them."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    projection = Projection(4)
    mean = sum(float(projection(x, step).double().square().sum()) for step in range(400)) / 400
    assert mean == pytest.approx(float(x.double().square().sum()), rel=5 * math.sqrt(2 / 4 / 400))


def test_the_variance_is_that_of_the_documentation() -> None:
    """Relative standard deviation sqrt(2 / width); of 2,000 draws it is known to 1/sqrt(4,000) = 1.6 %, five of it."""
    x = torch.randn(70_000, generator=torch.Generator().manual_seed(0))
    for width in (1, 4):
        projection = Projection(width)
        squares = torch.tensor([float(projection(x, step).double().square().sum()) for step in range(2000)])
        relative = float(squares.std() / x.square().sum())
        assert relative == pytest.approx(math.sqrt(2 / width), rel=0.1)  # and a kurtosis of 12 for width 1


def test_equal_steps_give_equal_signs_and_others_do_not() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Projection(4)(x, 7), Projection(4)(x, 7))
    assert not torch.equal(Projection(4)(x, 7), Projection(4)(x, 8))


@pytest.mark.parametrize("n", [5, 70_000])
def test_projections_are_linear(n: int) -> None:
    """So that the spread of projections is the projection of the spread. float32 sums of n terms."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    projection = Projection(4)
    torch.testing.assert_close(
        projection(x - y, 3), projection(x, 3) - projection(y, 3), rtol=0, atol=1e-5 * math.sqrt(n)
    )


def test_every_coordinate_counts_once_whichever_way_the_vector_is_folded() -> None:
    """Unit vectors: one number of magnitude one."""
    projection = Projection(4)
    for n, places in ((10, range(10)), (131_050, (0, 65_520, 65_521, 131_041, 131_042, 131_049))):
        for place in places:
            x = torch.zeros(n)
            x[place] = 1.0
            assert sorted(projection(x, 0).abs().tolist()) == [0.0, 0.0, 0.0, 1.0]
