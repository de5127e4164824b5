"""The residual of one parameter: the laws of momentum correction, masking, clipping and dropping a step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distrobust.compression.memory import Residual, Rule, accumulate, clip_factor, decayed, remove_sent
from distrobust.errors import CheckpointError

CPU = torch.device("cpu")
N = 50
each_form = pytest.mark.parametrize("nesterov", [False, True])


def gradients(num: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, generator=g) for _ in range(num)]


def send_everything(residual: Residual) -> Tensor:
    sent = residual.next_v.clone()
    remove_sent(residual, torch.arange(N), sent)
    residual.commit(settled=False)
    return sent


class Sgd:
    """torch.optim.SGD at learning rate 1 on a parameter that starts at zero: what it subtracted in each step."""

    def __init__(self, **options: float) -> None:
        self.p = torch.zeros(N, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.p], lr=1.0, **options)

    def step(self, g: Tensor) -> None:
        self.p.grad = g.clone()
        self.optimizer.step()


@each_form
def test_density_one_without_masking_is_sgd_with_momentum_to_the_bit(nesterov: bool) -> None:
    residual = Residual(N, Rule(0.9, nesterov, masking=False), CPU)
    sgd = Sgd(momentum=0.9, nesterov=nesterov)
    p = torch.zeros(N)
    for g in gradients(6):
        accumulate(residual, g)
        p -= send_everything(residual)
        sgd.step(g)
        assert torch.equal(p, sgd.p)


@pytest.mark.parametrize(("nesterov", "factor"), [(False, 1.0), (True, 1.9)])
def test_density_one_with_masking_is_sgd_without_momentum(nesterov: bool, factor: float) -> None:
    """What is sent is cleared, so u is the gradient alone; Nesterov looks one step ahead: g + m g."""
    residual = Residual(N, Rule(0.9, nesterov, masking=True), CPU)
    for g in gradients(4):
        accumulate(residual, g)
        torch.testing.assert_close(send_everything(residual), factor * g, rtol=2.0**-22, atol=0)


@each_form
def test_without_masking_all_that_is_sent_and_kept_is_what_sgd_would_have_applied(nesterov: bool) -> None:
    """Selection delays and changes no total. 10 additions of values below 32 on each side: 2 x 10 x 32 x 2^-24."""
    residual = Residual(N, Rule(0.9, nesterov, masking=False), CPU)
    sgd = Sgd(momentum=0.9, nesterov=nesterov)
    p = torch.zeros(N)
    for step, g in enumerate(gradients(10)):
        accumulate(residual, g)
        indices = torch.arange(step % 7, N, 7)
        sent = residual.next_v[indices]
        remove_sent(residual, indices, sent)
        residual.commit(settled=False)
        p[indices] -= sent
        sgd.step(g)
    torch.testing.assert_close(p - residual.v, sgd.p.detach(), rtol=0, atol=20 * 32 * 2.0**-24)


def test_masking_clears_momentum_where_something_was_sent_and_nowhere_else() -> None:
    residual = Residual(N, Rule(0.9), CPU)
    accumulate(residual, gradients(1)[0])
    before = residual.next_u.clone()
    indices = torch.tensor([3, 17])
    remove_sent(residual, indices, residual.next_v[indices])
    others = torch.ones(N, dtype=torch.bool)
    others[indices] = False
    assert torch.equal(residual.next_u[others], before[others])
    assert not residual.next_u[indices].any()


def test_rounding_stays_in_the_residual() -> None:
    residual = Residual(N, Rule(0.9), CPU)
    accumulate(residual, torch.full((N,), 1 / 3))
    remove_sent(residual, torch.tensor([0]), torch.tensor([0.25]))
    assert residual.next_v[0] == torch.tensor(1 / 3) - 0.25


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_that_is_not_committed_leaves_no_trace(poison: float, momentum: float) -> None:
    residual = Residual(N, Rule(momentum), CPU)
    twin = Residual(N, Rule(momentum), CPU)
    first, second, third = gradients(3)
    second[5] = poison
    for g, happens in ((first, True), (second, False), (third, True)):
        accumulate(residual, g)
        remove_sent(residual, torch.arange(9), residual.next_v[:9].clone())
        if not happens:
            continue
        residual.commit(settled=False)
        accumulate(twin, g)
        remove_sent(twin, torch.arange(9), twin.next_v[:9].clone())
        twin.commit(settled=False)
    assert torch.equal(residual.v, twin.v)
    assert torch.equal(residual.u, twin.u)


def test_momentum_zero_is_plain_error_feedback_and_keeps_no_velocity() -> None:
    residual = Residual(N, Rule(momentum=0.0), CPU)
    first, second = gradients(2)
    for g in (first, second):
        accumulate(residual, g)
        residual.commit(settled=False)
    assert residual.u.numel() == 0
    assert torch.equal(residual.v, first + second)


def clipped(g: Tensor, rule: Rule, num_workers: int) -> Tensor:
    return decayed(g, torch.zeros(N), rule, clip_factor(g, rule, num_workers))


@given(st.floats(1e-3, 1e3), st.integers(1, 64), st.floats(1e-6, 1e6))
def test_clipping_bounds_the_norm_by_threshold_over_root_n_and_keeps_the_direction(
    clip: float, num_workers: int, size: float
) -> None:
    g = gradients(1)[0] * size
    ours = clipped(g, Rule(clip=clip), num_workers)
    bound = clip / math.sqrt(num_workers)
    norm = float(torch.linalg.vector_norm(g))
    # norm, quotient and product round once each, and the norm's sum of 50 squares a few times more: 2^-20
    assert float(torch.linalg.vector_norm(ours)) <= bound * (1 + 2.0**-20)
    torch.testing.assert_close(ours, g * min(1.0, bound / norm), rtol=2.0**-20, atol=0)
    if norm <= bound * (1 - 2.0**-20):
        assert torch.equal(ours, g)


def test_clipping_a_zero_gradient_gives_zero() -> None:
    assert not clipped(torch.zeros(N), Rule(clip=1.0), 4).any()


def test_without_clipping_the_factor_is_one() -> None:
    assert clip_factor(torch.ones(N), Rule(), 4) == 1.0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_clipping_does_not_hide_a_gradient_that_is_not_finite(poison: float) -> None:
    g = gradients(1)[0]
    g[7] = poison
    assert not torch.isfinite(clipped(g, Rule(clip=1.0), 2)[7])


def test_weight_decay_is_added_after_clipping() -> None:
    """Clipping bounds the gradient of the loss, as clip_grad_norm_ before an optimizer with weight decay does."""
    g, w = gradients(2)
    rule = Rule(weight_decay=0.1, clip=0.01)
    expected = clipped(g, Rule(clip=0.01), 1).add(w, alpha=0.1)
    assert torch.equal(decayed(g, w, rule, clip_factor(g, rule, 1)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_is_accumulated_is_float32_whatever_the_gradient_is(dtype: torch.dtype, weight_decay: float) -> None:
    g, w = (t.to(dtype) for t in gradients(2))
    made = decayed(g, w, Rule(weight_decay=weight_decay))
    assert made.dtype == torch.float32
    # one product and one sum, both below 8
    torch.testing.assert_close(made, g.float() + weight_decay * w.float(), rtol=0, atol=2 * 8 * 2.0**-24)


def test_the_gradient_handed_in_is_not_changed() -> None:
    g, w = gradients(2)
    before = g.clone()
    residual = Residual(N, Rule(0.9, nesterov=True, weight_decay=0.1, clip=1.0), CPU)
    accumulate(residual, decayed(g, w, residual.rule, clip_factor(g, residual.rule, 2)))
    assert torch.equal(g, before)


def test_from_one_settled_step_to_the_next_v_is_untouched_and_u_moves_on() -> None:
    residual = Residual(N, Rule(0.5), CPU)
    zero = residual.v
    for g in gradients(2):
        accumulate(residual, g)
        residual.commit(settled=True)
        assert residual.v is zero
        assert residual.settled
    assert bool(residual.u.any())
    accumulate(residual, gradients(1)[0])
    residual.commit(settled=False)
    assert residual.v is not zero
    assert not residual.settled


@pytest.mark.parametrize(("u", "v"), [(0, N), (N, N + 1), (N + 1, N), (N, 0)])
def test_loading_other_sizes_is_refused_and_changes_nothing(u: int, v: int) -> None:
    residual = Residual(N, Rule(0.9), CPU)
    with pytest.raises(CheckpointError, match=f"residual of {u} [+] {v} values, expected {N} [+] {N}"):
        residual.load(torch.ones(u), torch.ones(v), settled=False)
    assert not residual.u.any()
    assert not residual.v.any()
    assert residual.settled
