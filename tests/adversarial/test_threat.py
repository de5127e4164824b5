"""Laws of the norm balls."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrobust.adversarial.threat import L1_SHARE, Norm, Threat, ascend, noise, project, random_start
from distrobust.errors import ConfigError

NORMS = get_args(Norm)
threats = st.one_of(
    st.builds(Threat, st.just("linf"), st.floats(0, 1)),
    st.builds(Threat, st.just("l2"), st.floats(0, 10)),
    st.builds(Threat, st.just("l1"), st.floats(0, 40)),
)


def images(seed: int, num: int = 5) -> torch.Tensor:
    return torch.rand(num, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def distances(x_adv: torch.Tensor, x: torch.Tensor, threat: Threat) -> torch.Tensor:
    ord_ = {"linf": math.inf, "l2": 2, "l1": 1}[threat.norm]
    return torch.as_tensor(torch.linalg.vector_norm((x_adv - x).double(), ord=ord_, dim=(1, 2, 3)))


def slack(threat: Threat) -> float:
    # x + delta rounds by 2^-24 per pixel for values up to 1, in L2 over 32 pixels sqrt(32) of it, in L1 32 of it;
    # the norm and the factor round by a few 2^-24 of eps
    pixels = 32 if threat.norm == "l1" else math.sqrt(32)
    return 2**-24 * (pixels + 1 + 8 * threat.eps)


@settings(max_examples=50)
@given(threats, st.integers(0, 1000), st.floats(0.01, 20))
def test_projection_lands_in_the_ball_and_in_the_unit_interval(threat: Threat, seed: int, far: float) -> None:
    x = images(seed)
    x_adv = project(x + far * (images(seed + 1) - 0.5), x, threat)
    assert distances(x_adv, x, threat).max() <= threat.eps + slack(threat)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@settings(max_examples=30)
@given(threats, st.integers(0, 1000))
def test_projection_of_a_point_inside_changes_nothing(threat: Threat, seed: int) -> None:
    x = images(seed)
    x_adv = random_start(x, threat, torch.Generator().manual_seed(seed))
    # projecting recomputes x + (x' - x): one rounding more
    torch.testing.assert_close(project(x_adv, x, threat), x_adv, rtol=2**-22, atol=2**-22)


@settings(max_examples=30)
@given(threats, st.integers(0, 1000))
def test_random_start_is_in_the_ball_and_in_the_unit_interval(threat: Threat, seed: int) -> None:
    x = images(seed)
    x_adv = random_start(x, threat, torch.Generator().manual_seed(seed))
    assert distances(x_adv, x, threat).max() <= threat.eps + slack(threat)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_fills_the_ball_evenly(norm: str) -> None:
    # In a uniform ball of d dimensions the radius is distributed as U^(1/d), of mean d/(d+1), in both norms.
    x = torch.full((20_000, 1, 1, 3), 0.5)
    threat = Threat(norm, 0.1)  # type: ignore[arg-type]
    radius = distances(random_start(x, threat, torch.Generator().manual_seed(0)), x, threat) / 0.1
    # variance d/((d+1)^2 (d+2)) = 0.0375; 4 standard errors of the mean of 20,000
    assert abs(radius.mean().item() - 0.75) < 4 * math.sqrt(0.0375 / 20_000)


@pytest.mark.parametrize("norm", NORMS)
def test_random_numbers_do_not_depend_on_memory_format_or_dtype(norm: str) -> None:
    x = torch.full((3, 2, 4, 4), 0.5)
    threat = Threat(norm, 0.1)  # type: ignore[arg-type]
    plain, last, double = (
        random_start(y, threat, torch.Generator().manual_seed(3))
        for y in (x, x.to(memory_format=torch.channels_last), x.double())
    )
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, double.float())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_noise_start_step_and_projection_keep_dtype_and_memory_format(norm: str, dtype: torch.dtype) -> None:
    x = torch.rand(3, 2, 4, 4).to(dtype).to(memory_format=torch.channels_last)
    threat, g = Threat(norm, 0.1), torch.Generator()  # type: ignore[arg-type]
    start = random_start(x, threat, g)
    made = [noise(x, threat.norm, 0.1, g), start, ascend(x, start - 0.5, 0.1, threat), project(start, x, threat)]
    assert [(y.dtype, y.stride()) for y in made] == [(dtype, x.stride())] * 4


@settings(max_examples=100)
@given(st.integers(0, 1000), st.floats(0, 20), st.floats(0.01, 5))
def test_the_l1_projection_is_the_nearest_point_of_ball_and_box(seed: int, eps: float, far: float) -> None:
    """By the optimality condition of a convex problem: no feasible point lies on the far side of the projection."""
    x, threat = images(seed).double(), Threat("l1", eps)
    outside = x + far * (images(seed + 1) - 0.5).double()
    nearest = project(outside, x, threat)
    others = random_start(x, threat, torch.Generator().manual_seed(seed + 2))
    vertices = x.clone()  # the extreme points of a small ball: one pixel moved
    vertices[:, 0, 0, 0] = (x[:, 0, 0, 0] + eps).clamp(max=1.0)
    for feasible in (others, vertices, x, project(nearest + 0.1 * (others - x), x, threat)):
        side = ((outside - nearest) * (feasible - nearest)).sum(dim=(1, 2, 3))
        assert side.max() <= 1e-6


def test_an_l1_step_moves_the_steepest_entries_that_have_room() -> None:
    x = torch.full((1, 1, 20, 20), 0.5)
    x[0, 0, 0, 0] = 1.0
    g = torch.linspace(0.1, 1.0, 400).view(1, 1, 20, 20).clone()
    g[0, 0, 0, 0], g[0, 0, 0, 1] = 9.0, -8.0  # the first has no room, the second goes down
    moved = (ascend(x, g, 0.4, Threat("l1", 1.0)) - x).flatten()
    assert L1_SHARE * 400 == 4
    expected = torch.zeros(400)
    expected[[1, 397, 398, 399]] = torch.tensor([-0.1, 0.1, 0.1, 0.1])
    torch.testing.assert_close(moved, expected)


def test_a_step_is_the_sign_for_linf_and_the_unit_vector_for_l2() -> None:
    x = torch.full((2, 1, 1, 2), 0.5)
    g = torch.tensor([[3.0, -4.0], [0.0, 2.0]]).view(2, 1, 1, 2)
    linf, l2 = (ascend(x, g, 0.1, Threat(norm, 0.2)) - x for norm in ("linf", "l2"))
    torch.testing.assert_close(linf.view(2, 2), torch.tensor([[0.1, -0.1], [0.0, 0.1]]))
    torch.testing.assert_close(l2.view(2, 2), torch.tensor([[0.06, -0.08], [0.0, 0.1]]))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_does_not_depend_on_the_gradients_scale(norm: str, scale: float) -> None:
    # Squares of 1e-30 and 1e30 are outside float32: a plain norm would give 0 or infinity.
    x, g = torch.full((4, 2, 4, 4), 0.5), images(1, 4) - 0.5
    threat = Threat(norm, 0.3)  # type: ignore[arg-type]
    torch.testing.assert_close(ascend(x, scale * g, 0.1, threat), ascend(x, g, 0.1, threat))


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_or_nan_gradient_moves_nothing(norm: str) -> None:
    x = images(0, 2)
    g = torch.stack([torch.zeros(2, 4, 4), torch.full((2, 4, 4), math.nan)])
    assert torch.equal(ascend(x, g, 0.1, Threat(norm, 0.3)), x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("norm", "eps", "text"),
    [
        ("linf", 8, r"8/255 = 0\.03137"),
        ("linf", -0.1, "at least 0"),
        ("l2", math.nan, "threat.eps: nan"),
        ("l2", math.inf, "finite"),
        ("Linf", 0.1, "did you mean 'linf'"),
        ("l3", 0.1, "did you mean 'l"),
    ],
)
def test_impossible_threats_are_refused(norm: str, eps: float, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Threat(norm, eps)  # type: ignore[arg-type]


def test_l2_radius_may_be_above_one() -> None:
    assert Threat("l2", 3.0).eps == 3.0


def test_description_is_in_grey_levels_where_whole() -> None:
    assert Threat("linf", 8 / 255).describe() == "Linf 8/255"
    assert Threat("linf", 4 / 255).describe() == "Linf 4/255"
    assert Threat("linf", 0.2).describe() == "Linf 0.2"
    assert Threat("l2", 128 / 255).describe() == "L2 0.502"
