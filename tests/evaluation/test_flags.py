"""Models that hide their gradients raise the flags they must; an ordinary model raises none."""

import math
import sys

import numpy as np
import pytest
import torch
from harness import attacked
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distrobust.adversarial.threat import Threat
from distrobust.errors import DataError, ModelError
from distrobust.evaluation import checks, libraries
from distrobust.evaluation.evaluation import Evaluation, run
from distrobust.evaluation.finding import Finding
from distrobust.evaluation.suite import Suite, grey_budget
from distrobust.evaluation.trial import Trial, Verdict

LINF = Threat("linf", 0.06)
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def model_and_batches() -> tuple[nn.Module, Batches]:
    return attacked.trained(1024, 256)


def evaluated(model: nn.Module, batches: Batches, suite: Suite, source: nn.Module | None = None) -> Evaluation:
    return run(model, batches, suite, num_classes=attacked.CLASSES, source=source)


def names(evaluation: Evaluation) -> set[str]:
    return {flag.name for flag in evaluation.flags}


def test_an_ordinary_model_raises_no_flag(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, batches = model_and_batches
    evaluation = evaluated(model, batches, Suite(LINF))
    assert evaluation.flags == ()
    assert {result.role for result in evaluation.results} == {"attack", "check"}
    assert 0.3 < evaluation.results[1].score.accuracy < 0.9, "the attack is neither hopeless nor trivial"


@pytest.mark.parametrize(
    ("hide", "wanted"),
    [
        (attacked.Saturated, {"zero gradients", "accuracy at a large budget", "black box beats white box"}),
        (attacked.Quantised, {"zero gradients", "accuracy at a large budget", "black box beats white box"}),
        (attacked.Noisy, {"randomised model"}),
        (attacked.Probabilities, {"probabilities"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_hides_its_gradient_is_flagged(
    model_and_batches: tuple[nn.Module, Batches], hide: type[nn.Module], wanted: set[str]
) -> None:
    model, batches = model_and_batches
    checks = "black box beats white box" in wanted
    evaluation = evaluated(hide(model).eval(), batches, Suite(LINF, steps=10, checks=checks))
    assert wanted <= names(evaluation)
    assert all(flag.reason and flag.remedy for flag in evaluation.flags)
    pgd = evaluation.results[1].score
    assert wanted <= {sentence.split(":")[0] for sentence in pgd.flags}, "the number carries its flags"


def test_noise_that_changes_no_prediction_is_flagged_too(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, batches = model_and_batches

    class Jitter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = torch.as_tensor(model(x))
            return logits * (1 + 0.001 * torch.rand_like(logits[:, :1])) + 0.001 * torch.randn_like(logits)

    evaluation = evaluated(Jitter().eval(), batches[:1], Suite(LINF, steps=1, checks=False))
    assert "randomised model" in names(evaluation)


def test_few_samples_and_training_mode_are_flagged(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, batches = model_and_batches
    model.train()
    try:
        evaluation = evaluated(model, [(batches[0][0][:20], batches[0][1][:20])], Suite(LINF, steps=2, checks=False))
        assert model.training
    finally:
        model.eval()
    assert names(evaluation) == {"few samples", "training mode"}


class Root(nn.Module):
    """sqrt has an infinite derivative at 0, which the zero-weighted branch turns into NaN."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x)) + 0 * x.sqrt().sum((1, 2, 3)).unsqueeze(1)


def test_non_finite_gradients_are_flagged(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, batches = model_and_batches
    evaluation = evaluated(Root(model), batches[:1], Suite(LINF, steps=2, checks=False))
    assert "non-finite gradients" in names(evaluation)


def test_too_few_steps_are_flagged_as_not_converged(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, batches = model_and_batches

    class Peephole(nn.Module):
        """Shows the gradient of one row of the image, another one at every step."""

        def forward(self, x: Tensor) -> Tensor:
            row = (1e4 * x.sum((1, 2, 3))).long() % 8
            seen = (torch.arange(8) == row.unsqueeze(1)).view(-1, 1, 8, 1)
            return torch.as_tensor(model(torch.where(seen, x, x.detach())))

    (flag,) = [f for f in evaluated(Peephole(), batches, Suite(LINF, steps=1)).flags if f.name == "not converged"]
    assert "--steps 5" in flag.remedy


def test_a_transfer_that_beats_pgd_is_flagged(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, batches = model_and_batches
    suite = Suite(LINF, ("pgd", "transfer"), checks=False)
    evaluation = evaluated(attacked.Quantised(model).eval(), batches, suite, source=model)
    (flag,) = [flag for flag in evaluation.flags if flag.name == "black box beats white box"]
    assert flag.reason.startswith("transfer PGD-20 Linf 0.06 broke ")
    transfer = next(r.score for r in evaluation.results if r.score.attack.startswith("transfer"))
    assert not any(sentence.startswith("zero gradients") for sentence in transfer.flags), "it needs no gradients here"


def test_without_gradients_an_attack_that_needs_them_is_refused_and_square_works(
    model_and_batches: tuple[nn.Module, Batches], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = model_and_batches
    detached, few = attacked.Detached(model).eval(), [(batches[0][0][:50], batches[0][1][:50])]
    with pytest.raises(ModelError, match=r"PGD-20 .* no gradient with respect to its input .* --attacks square"):
        evaluated(detached, few, Suite(LINF))
    monkeypatch.setattr("distrobust.evaluation.suite.SQUARE_QUERIES", 100)
    evaluation = evaluated(detached, few, Suite(LINF, ("square",)))
    clean, square = evaluation.results
    assert square.score.correct < clean.score.correct
    assert names(evaluation) == {"few samples", "no gradients"}


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_images_outside_zero_one_are_refused(bad: float) -> None:
    x = torch.full((2, 1, 8, 8), bad)
    with pytest.raises(DataError, match=r"batch 0: float images are in \["):
        evaluated(nn.Identity(), [(x, torch.tensor([0, 1]))], Suite(LINF))


def test_without_the_library_the_missing_black_box_is_a_flag(
    model_and_batches: tuple[nn.Module, Batches], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert not libraries.is_installed("pyautoattack")
    model, batches = model_and_batches
    assert "black box not tried" in names(evaluated(model, batches[:1], Suite(LINF, steps=2)))


def finding(codes: str, trial: Trial | None = None, **counts: int) -> Finding:
    return Finding(trial or Trial("pgd", LINF, 20), (Verdict(codes, counts),), np.zeros(len(codes), np.int64))


def test_attacks_are_compared_image_by_image_where_both_were_tried() -> None:
    stands, falls = finding("1" * 20 + "0"), finding("0" * 10 + "-" * 10 + "1")
    assert checks.breaks_more(falls, stands) == 10  # 10 against 1: P = 12/2048
    assert checks.breaks_more(finding("0" * 8 + "1" * 13), stands) == 0  # 8 against 1: P = 10/512
    assert checks.breaks_more(stands, falls) == 0


@given(st.integers(0, 60), st.integers(0, 60))
def test_sign_test_is_a_tail_of_a_fair_coin(b: int, c: int) -> None:
    both = checks.sign_test(b, c) + checks.sign_test(c, b)
    assert both == pytest.approx(1 + math.comb(b + c, b) / 2 ** (b + c))  # the two tails overlap in one value
    assert checks.sign_test(0, c) == 1.0


def test_square_after_autoattack_may_break_two_in_a_thousand_only() -> None:
    white = Trial("fab-t", LINF, 100, after=("clean",))
    square = Trial("square", LINF, 5000, after=("clean", white.key))
    start = finding("1" * 1000, white)
    for fallen, raised in ((2, False), (12, True)):
        found = checks.reasons_for_distrust([start, finding("0" * fallen + "1" * (1000 - fallen), square)])
        assert ("black box beats white box" in {flag.name for flag in found}) is raised


def test_examples_outside_the_ball_are_flagged() -> None:
    (flag,) = checks.reasons_for_distrust([finding("1" * 10, outside=3)])
    assert flag.name == "outside the ball"
    assert flag.reason.startswith("3 examples")


@pytest.mark.parametrize(("norm", "order"), [("linf", math.inf), ("l2", 2), ("l1", 1)])
def test_the_large_ball_around_any_image_holds_the_grey_one(norm: str, order: float) -> None:
    large = grey_budget(Threat(norm, 0.1), 64)  # type: ignore[arg-type]
    corners = torch.randint(2, (50, 64), generator=torch.Generator().manual_seed(0)).float()
    distances = torch.linalg.vector_norm(corners - 0.5, ord=order, dim=1)
    assert torch.allclose(distances, torch.tensor(large.eps))  # corners are the farthest images
