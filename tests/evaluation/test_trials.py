"""Laws of trials: verdicts that do not depend on who runs them, worst cases, curves, what is spent."""

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import get_args

import numpy as np
import pytest
import torch
from harness import attacked
from torch import Tensor, nn

from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Norm, Threat
from distrobust.errors import ConfigError
from distrobust.evaluation import libraries, suite
from distrobust.evaluation import trial as trial_module
from distrobust.evaluation.accuracy import wilson
from distrobust.evaluation.counting import batch_seed, count_correct
from distrobust.evaluation.evaluation import run, standing, summary
from distrobust.evaluation.finding import Finding, expected_robustness
from distrobust.evaluation.libraries import AutoAttackPart
from distrobust.evaluation.passes import counted
from distrobust.evaluation.suite import Suite, parse_budget, parse_names
from distrobust.evaluation.trial import Trial, Verdict, attempt, in_ball

# foolbox 3.3.4 imports gaussian_filter from a module scipy has deprecated; nothing of ours can change that.
needs_foolbox = pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")
LINF = Threat("linf", 0.06)
EPS = {"linf": 0.06, "l2": 0.5, "l1": 2.0}
CLEAN = Trial("clean")
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def model_and_batches() -> tuple[nn.Module, Batches]:
    return attacked.trained(60, 12)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack's four with six steps instead of a hundred, and 50 queries instead of 5000."""
    from pyautoattack import AutoAttack

    def made(self: AutoAttack, *arguments: object, **options: object) -> None:
        original(self, *arguments, **options)
        for attack in (self.apgd, self.apgd_targeted, self.fab):
            attack.n_iter = attack.n_iter_orig = 6

    original = AutoAttack.__init__
    monkeypatch.setattr(AutoAttack, "__init__", made)
    monkeypatch.setattr(suite, "SQUARE_QUERIES", 50)


def right(evaluation_result: object) -> tuple[int, ...]:
    return evaluation_result.score.class_correct  # type: ignore[attr-defined, no-any-return]


@needs_foolbox
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("norm", get_args(Norm))
def test_shards_of_three_ranks_give_the_verdicts_of_one(
    model_and_batches: tuple[nn.Module, Batches], norm: str
) -> None:
    """All attacks, AutoAttack included: rank r takes batches r, r + 3, ... in any order of ranks."""
    model, batches = model_and_batches
    threat = Threat(norm, EPS[norm])  # type: ignore[arg-type]
    wanted = Suite(threat, ("pgd", "autoattack", "foolbox", "transfer"), steps=3, checks=False)
    whole = run(model, batches, wanted, num_classes=attacked.CLASSES, seed=3, source=model)
    labels = torch.cat([y for _, y in batches]).numpy()
    trials = wanted.trials(len(labels), attacked.CLASSES, (1, 8, 8))
    done: dict[tuple[str, int], Verdict] = {}
    for rank in (2, 0, 1):
        torch.manual_seed(rank)  # whatever else the process draws
        for trial, index in itertools.product(trials, range(rank, len(batches), 3)):
            x, y = batches[index]
            before = standing(trial, index, done)
            done[trial.key, index] = attempt(
                trial, model, x, y, seed=3, index=index, first=12 * index, standing=before, source=model
            )
    parts = summary(trials, done, labels, attacked.CLASSES, 3)
    assert [right(r) for r in parts.results] == [right(r) for r in whole.results]
    assert [r.forward_images for r in parts.results] == [r.forward_images for r in whole.results]
    accuracies = [r.score.accuracy for r in whole.results]
    assert 0 < accuracies[-1] < accuracies[0], "the worst case is neither trivial nor hopeless"


@contextmanager
def gradients_taken(model: nn.Module) -> Iterator[list[Tensor]]:
    """The images at which the gradient with respect to them is asked for."""
    seen: list[Tensor] = []

    def record(_: nn.Module, arguments: tuple[Tensor]) -> None:
        if arguments[0].requires_grad:
            seen.append(arguments[0].detach().clone())

    handle = model.register_forward_pre_hook(record)
    yield seen
    handle.remove()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_autoattacks_parts_in_a_row_are_the_librarys_own_run(
    model_and_batches: tuple[nn.Module, Batches], norm: str
) -> None:
    from pyautoattack import AutoAttack

    model, (x, y) = model_and_batches[0], model_and_batches[1][0]
    threat = Threat(norm.lower(), EPS[norm.lower()])  # type: ignore[arg-type]
    theirs = AutoAttack(model, norm=norm, eps=threat.eps, seed=batch_seed(0, 0))
    theirs.square.n_queries = 50
    for targeted in (theirs.apgd_targeted, theirs.fab):
        targeted.n_target_classes = attacked.CLASSES - 1
    with gradients_taken(model) as at_theirs:
        x_adv, _ = theirs.run_standard_evaluation(x, y)
    with torch.no_grad():
        robust = (model(x_adv).argmax(1) == y).tolist()

    done: dict[tuple[str, int], Verdict] = {(CLEAN.key, 0): attempt(CLEAN, model, x, y, seed=0, index=0, first=0)}
    before: tuple[str, ...] = (CLEAN.key,)
    with gradients_taken(model) as at_ours:
        for kind, steps in (("apgd-ce", 100), ("apgd-t", 100), ("fab-t", 100), ("square", 50)):
            trial = Trial(kind, threat, steps, after=before)  # type: ignore[arg-type]
            done[trial.key, 0] = attempt(
                trial, model, x, y, seed=0, index=0, first=0, standing=standing(trial, 0, done)
            )
            before = (*before, trial.key)
    at_ours = [images for images in at_ours if not (len(images) == 1 and torch.equal(images, x[:1]))]  # is there one?
    assert all(torch.equal(a, b) for a, b in zip(at_theirs, at_ours, strict=True))
    assert [code == "1" for code in done[before[-1], 0].right] == robust
    assert 0 < sum(robust) < len(robust)


def test_pgd_of_one_start_counts_as_count_correct_does(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, batches = model_and_batches
    evaluation = run(model, batches, Suite(LINF, steps=5, checks=False), num_classes=attacked.CLASSES, seed=7)
    counts = count_correct(model, batches, Attack("pgd", 5), LINF, 7)
    assert right(evaluation.results[1]) == counts.class_correct
    assert evaluation.results[1].score.class_samples == counts.class_samples
    assert (evaluation.results[1].score.low, evaluation.results[1].score.high) == wilson(counts.correct, 60)


def test_more_restarts_break_the_same_images_and_more(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, batches = model_and_batches
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    one, many = (
        attempt(Trial("pgd", LINF, 1, restarts), model, x, y, seed=0, index=0, first=0).right for restarts in (1, 8)
    )
    assert all(a >= b for a, b in zip(one, many, strict=True))
    assert one != many


def test_what_has_fallen_is_not_attacked_again(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, (x, y) = model_and_batches[0], model_and_batches[1][0]
    stands = torch.arange(len(y)) < 4
    verdict = attempt(Trial("pgd", LINF, 3), model, x, y, seed=0, index=0, first=0, standing=stands)
    assert set(verdict.right[4:]) == {"0"}
    assert verdict.forward == 1 + 3 * 4 + 4  # is there a gradient; three steps; the judgement
    assert verdict.backward == 1 + 3 * 4
    nobody = attempt(Trial("pgd", LINF, 3), model, x, y, seed=0, index=0, first=0, standing=stands & False)
    assert (nobody.right, nobody.forward) == ("0" * len(y), 0)


def test_an_images_start_depends_on_no_other_image(
    model_and_batches: tuple[nn.Module, Batches], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = model_and_batches[0], model_and_batches[1][0]
    starts: list[Tensor] = []

    def stay(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, steps: int, start: Tensor) -> Tensor:
        starts.append(start)
        return x

    monkeypatch.setattr(trial_module, "pgd", stay)
    for stands in (torch.arange(len(y)) >= 0, torch.arange(len(y)) == 5):
        attempt(Trial("pgd", LINF, 1, 2), model, x, y, seed=0, index=0, first=0, standing=stands)
    first, second, first_alone, second_alone = starts
    right = (model(x).argmax(1) == y).tolist()
    assert right[5], "it stands for the second start too"
    assert torch.equal(first_alone[0], first[5])
    assert torch.equal(second_alone[0], second[sum(right[:5])])
    assert not torch.equal(first_alone, second_alone)


@needs_foolbox
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", ["apgd-ce", "square", "foolbox"])
def test_a_librarys_random_numbers_are_a_function_of_seed_and_batch(
    model_and_batches: tuple[nn.Module, Batches], kind: str
) -> None:
    model, (x, y) = model_and_batches[0], model_and_batches[1][0]

    def seen(seed: int, index: int) -> list[Tensor]:
        images: list[Tensor] = []
        handle = model.register_forward_pre_hook(lambda _, args: images.append(args[0].detach().clone()))
        attempt(Trial(kind, LINF, 3), model, x, y, seed=seed, index=index, first=0)  # type: ignore[arg-type]
        handle.remove()
        return images

    torch.manual_seed(1)
    first = seen(0, 0)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, seen(0, 0), strict=True))
    for other in (seen(1, 0), seen(0, 1)):
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=False))


def test_examples_outside_the_ball_break_nothing_and_are_counted(
    model_and_batches: tuple[nn.Module, Batches], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = model_and_batches[0], model_and_batches[1][0]
    monkeypatch.setattr(trial_module, "foolbox_examples", lambda model, x, *_: 1 - x)
    verdict = attempt(Trial("foolbox", LINF, 3), model, x, y, seed=0, index=0, first=0)
    assert verdict.right == "1" * len(y)
    assert verdict.counts == {"outside": len(y)}


def test_what_is_added_up_comes_after_what_it_adds_to() -> None:
    wanted = Suite(LINF, ("pgd", "autoattack", "foolbox", "square", "curve"))
    trials = wanted.trials(1000, 10, (1, 8, 8))
    for number, trial in enumerate(trials):
        assert set(trial.after) <= {t.key for t in trials[:number]}
    clean, pgd = trials[0].key, next(t.key for t in trials if t.kind == "pgd")
    for role in ("curve", "attack"):  # the curve, and AutoAttack's four
        chain = [t for t in trials if t.role == role and (role == "curve" or t.kind in get_args(AutoAttackPart))]
        chain = [t for t in chain if t.describe() != "Square-5000 Linf 0.06"]
        for earlier, later in itertools.pairwise(chain):
            assert {*earlier.after, earlier.key} <= set(later.after)
    compared = [t for t in trials if t.kind in ("foolbox", "square") and len(t.after) == 1]
    compared += [t for t in trials if t.role == "check" and t.threat == LINF]
    assert all(t.after == (clean,) and t.key != pgd for t in compared)


def test_a_part_of_the_images_is_chosen_by_their_number_in_the_data_set(
    model_and_batches: tuple[nn.Module, Batches],
) -> None:
    model, (x, y) = model_and_batches[0], model_and_batches[1][0]
    verdict = attempt(replace(CLEAN, every=5), model, x, y, seed=0, index=1, first=12)
    assert [number for number, code in enumerate(verdict.right, 12) if code != "-"] == [15, 20]


def test_passes_are_counted_in_images_both_ways() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.rand(3, 1, 2, 2, requires_grad=True)
    with counted(model) as passes:
        model(x).sum().backward()
        with torch.no_grad():
            model(x)
    model(x)
    assert (passes.forward, passes.backward) == (6, 3)


def test_accuracy_falls_along_the_curve_and_meets_pgd_and_clean(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, batches = model_and_batches
    wanted = Suite(LINF, ("pgd", "curve"), steps=5, checks=False)
    evaluation = run(model, batches, wanted, num_classes=attacked.CLASSES)
    clean, pgd = (r.score for r in evaluation.results[:2])
    curve = [r.score for r in evaluation.results if r.role == "curve"]
    assert [score.eps for score in curve] == pytest.approx([0.015, 0.03, 0.045, 0.06, 0.09, 0.12])
    correct = [clean.correct, *(score.correct for score in curve)]
    assert correct == sorted(correct, reverse=True)
    assert curve[3].correct <= pgd.correct
    assert evaluation.expected is not None
    by_hand = sum((b.eps - a.eps) * (a.accuracy + b.accuracy) / 2 for a, b in itertools.pairwise([clean, *curve]))
    assert evaluation.expected.mean == pytest.approx(by_hand / 0.12)
    assert evaluation.expected.low < evaluation.expected.mean < evaluation.expected.high


def test_expected_robustness_of_known_curves() -> None:
    def made(*codes: str) -> list[Finding]:
        trials = [CLEAN, *(Trial("pgd", Threat("linf", eps), 5, role="curve") for eps in (0.1, 0.4))]
        labels = np.zeros(len(codes[0]), np.int64)
        return [Finding(t, (Verdict(c),), labels) for t, c in zip(trials, codes, strict=True)]

    clean, *curve = made("1111", "1100", "1000")
    found = expected_robustness(clean, curve)
    assert found is not None
    # accuracies 1, 0.5, 0.25 at 0, 0.1, 0.4: (0.1 * 0.75 + 0.3 * 0.375) / 0.4
    assert (found.mean, found.eps_max, found.samples) == (pytest.approx(0.46875), 0.4, 4)
    clean, *curve = made("1111", "1111", "1111")
    found = expected_robustness(clean, curve)
    assert found is not None
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)
    assert expected_robustness(clean, []) is None


def test_the_worst_case_is_what_stands_under_every_attack(model_and_batches: tuple[nn.Module, Batches]) -> None:
    model, batches = model_and_batches
    other = attacked.Noisy(model).eval()
    evaluation = run(model, batches, Suite(LINF, ("pgd", "transfer"), 3), num_classes=attacked.CLASSES, source=other)
    worst = evaluation.results[-1]
    assert worst.role == "worst"
    assert worst.score.correct <= min(r.score.correct for r in evaluation.results[1:3])
    json.dumps(asdict(evaluation))


def test_a_key_names_everything_but_the_role() -> None:
    trial = Trial("pgd", LINF, 20, after=("clean",))
    others = [
        replace(trial, kind="foolbox"),
        replace(trial, threat=Threat("linf", 0.07)),
        replace(trial, threat=Threat("l2", 0.06)),
        replace(trial, steps=21),
        replace(trial, restarts=2),
        replace(trial, every=2),
        replace(trial, after=()),
    ]
    assert len({t.key for t in [trial, *others]}) == 8
    assert replace(trial, role="check").key == trial.key


@pytest.mark.parametrize("norm", get_args(Norm))
def test_points_of_the_ball_are_inside_and_others_are_not(norm: str) -> None:
    threat = Threat(norm, 0.2)  # type: ignore[arg-type]
    x = torch.full((4, 1, 2, 2), 0.5)
    step = 0.2 / {"linf": 1.0, "l2": 2.0, "l1": 4.0}[norm]  # of each of four entries
    x_adv = x + torch.tensor([step, 1.01 * step, math.nan, 0.0]).view(4, 1, 1, 1)
    x[3], x_adv[3] = 1.0, 1.01
    assert in_ball(x_adv, x, threat).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Suite(LINF, ("autoatack",)), "did you mean 'autoattack'"),
        (lambda: Suite(LINF, steps=0), "steps: got 0"),
        (lambda: Suite(Threat("linf", 0.0)), "eps: got 0"),
        (lambda: Suite(LINF, ("curve",), curve=(0.1, 3.0)), "images are in"),
        (lambda: Suite(LINF, ("autoattack",)).trials(10, 3, (1, 8, 8)), "at least 4 classes, the data set has 3"),
        (lambda: parse_budget("eight"), "eps: got 'eight'"),
        (lambda: parse_budget("1/0"), "eps: got '1/0'"),
        (lambda: parse_names("transfer", transfer=False), "give it with --source"),
    ],
)
def test_impossible_suites_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_names_of_attacks() -> None:
    everything = ("pgd", "autoattack", "foolbox", "square", "curve")
    assert parse_names("all", transfer=False) == everything
    assert parse_names("curve, PGD", transfer=True) == ("pgd", "curve", "transfer")
    assert parse_names("pdg", transfer=False) == ("pdg",)  # Suite says what is wrong with it


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ConfigError, match=r"pyautoattack is not installed; pip install 'distrobust\[evaluation\]'"):
        Suite(LINF, ("autoattack",))
    assert libraries.is_installed("pyautoattack") is False
