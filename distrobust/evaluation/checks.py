"""Whether to believe the numbers: the flags that what the attacks found can raise.

Two attacks on the same images are compared image by image (sign test, one-sided): if b images stand under
the first and not under the second, and c the other way round, equally strong attacks give b ~ Bin(b + c,
1/2); a flag needs P(at least b) < SIGNIFICANCE and so is raised by chance in at most one of a hundred
evaluations. Shares are held against their tolerance with the lower end of their Wilson interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from distrobust.evaluation import flags
from distrobust.evaluation.accuracy import wilson
from distrobust.evaluation.finding import Finding
from distrobust.evaluation.flags import MIN_SAMPLES, Flag
from distrobust.evaluation.libraries import is_installed

SIGNIFICANCE = 0.01
RIGHT_ON_GREY = 0.01  # share of images that may stand in a ball that holds the grey image
SQUARE_SHARE = 0.002  # of the images, that Square may break after AutoAttack's gradient attacks; the library's
GRADIENT_FLAGS = {"zero gradients", "non-finite gradients", "no gradients", "not converged"}


def reasons_for_distrust(findings: Sequence[Finding], *, training_mode: bool = False) -> tuple[Flag, ...]:
    """All flags that `findings`, of one evaluation, raise. training_mode: of the model as it was handed over."""
    return (
        *_of_the_data(findings, training_mode),
        *_of_the_model(findings),
        *_of_pgd(findings),
        *_of_black_boxes(findings),
        *_of_libraries(findings),
    )


def concerning(finding: Finding, raised: Sequence[Flag]) -> list[Flag]:
    """Those of `raised` that are a reason to distrust this number."""
    if finding.trial.kind == "clean":
        return [flag for flag in raised if flag.name in ("few samples", "training mode", "randomised model")]
    gradient_free = finding.trial.kind in ("square", "transfer")
    return [flag for flag in raised if not (gradient_free and flag.name in GRADIENT_FLAGS)]


def _find(findings: Sequence[Finding], kind: str, role: str | None = "attack") -> Finding | None:
    found = (f for f in findings if f.trial.kind == kind and (role is None or f.trial.role == role))
    return next(found, None)


def _of_the_data(findings: Sequence[Finding], training_mode: bool) -> Iterator[Flag]:
    clean = _find(findings, "clean")
    if clean is not None and clean.samples < MIN_SAMPLES:
        yield flags.few_samples(clean.samples)
    if training_mode:
        yield flags.training_mode()


def _of_the_model(findings: Sequence[Finding]) -> Iterator[Flag]:
    probe = _find(findings, "probe", None)
    if probe is None:
        return
    counts, n = probe.counts, probe.samples
    if counts["no_gradients"]:
        yield Flag(
            "no gradients",
            "the model's output has no gradient with respect to its input",
            "only attacks without gradients mean something: square, and transfer from a model like it (--source)",
        )
    if counts["zero_gradients"]:
        yield flags.zero_gradients(counts["zero_gradients"], n)
    if counts["nonfinite_gradients"]:
        yield flags.nonfinite_gradients(counts["nonfinite_gradients"], n)
    if counts["randomised"]:
        yield Flag(
            "randomised model",
            f"two forward passes differ on {counts['randomised']} of {n} images",
            "switch the randomness off for evaluation, or attack the expectation over it (EOT): a single forward "
            "pass tells neither the accuracy nor what breaks it",
        )
    if counts["probabilities"]:
        yield Flag(
            "probabilities",
            f"on {counts['probabilities']} of {n} images the output is a probability distribution",
            "return logits: a softmax before the loss makes its gradients vanish",
        )


def _of_pgd(findings: Sequence[Finding]) -> Iterator[Flag]:
    pgd = _find(findings, "pgd")
    for check in findings:
        if pgd is None or check.trial.role != "check" or check.trial.kind != "pgd":
            continue
        if check.trial.threat == pgd.trial.threat:
            broken = breaks_more(check, pgd)
            if broken:
                yield Flag(
                    "not converged",
                    f"{check.trial.describe()} broke {broken} of {check.samples} images that "
                    f"{pgd.trial.describe()} left standing",
                    f"more steps: --steps {check.trial.steps}, with --restarts 5; or --attacks autoattack",
                )
        elif wilson(check.correct, check.samples)[0] > RIGHT_ON_GREY:
            yield Flag(
                "accuracy at a large budget",
                f"{check.correct} of {check.samples} images are still right under {check.trial.describe()}, "
                "a ball that holds the grey image",
                "the attack fails, not the images: look for what hides the gradient (rounding, saturation, noise), "
                "and use --attacks autoattack or square",
            )


def _of_black_boxes(findings: Sequence[Finding]) -> Iterator[Flag]:
    pgd = _find(findings, "pgd")
    black_boxes = [f for f in findings if f.trial.kind in ("square", "transfer")]
    for black in black_boxes:
        if pgd is None or _is_last_of_autoattack(black, findings):
            continue
        broken = breaks_more(black, pgd)
        if broken:
            yield Flag(
                "black box beats white box",
                f"{black.trial.describe()} broke {broken} of {black.samples} images that "
                f"{pgd.trial.describe()}, which sees the gradients, left standing",
                "the gradients mislead: quote the lower number, and attack a differentiable stand-in (BPDA) or use "
                "--attacks autoattack,square",
            )
    if pgd is not None and not black_boxes and not is_installed("pyautoattack"):
        yield Flag(
            "black box not tried",
            "pyautoattack is not installed, so masked gradients may go unseen",
            "pip install 'distrobust[evaluation]'",
        )


def _of_libraries(findings: Sequence[Finding]) -> Iterator[Flag]:
    pgd, foolbox = _find(findings, "pgd"), _find(findings, "foolbox")
    if pgd is not None and foolbox is not None and (broken := breaks_more(foolbox, pgd)):
        yield Flag(
            "second opinion disagrees",
            f"{foolbox.trial.describe()} broke {broken} of {foolbox.samples} images that "
            f"{pgd.trial.describe()} left standing",
            "quote the lower number; try more --steps and --restarts",
        )
    for square in findings:
        if _is_last_of_autoattack(square, findings):
            white = next(f for f in findings if f.trial.key == square.trial.after[-1])
            more = white.correct - square.correct
            if wilson(more, square.samples)[0] > SQUARE_SHARE:
                yield Flag(
                    "black box beats white box",
                    f"Square broke {more} of {square.samples} images that AutoAttack's gradient attacks left standing",
                    "more than AutoAttack's authors tolerate: write an attack for this model, and look for what hides "
                    "its gradient",
                )
    for finding in findings:
        if finding.counts["outside"]:
            yield Flag(
                "outside the ball",
                f"{finding.counts['outside']} examples of {finding.trial.describe()} were too far away or not finite, "
                "and were not counted against the model",
                "quote another attack's number for this norm",
            )


def _is_last_of_autoattack(finding: Finding, findings: Sequence[Finding]) -> bool:
    return finding.trial.kind == "square" and len(finding.trial.after) > 1


def breaks_more(one: Finding, other: Finding) -> int:
    """How many images `one` broke that stand under `other`, if significantly more than the other way round;
    else 0. Over the images both tried."""
    both = (one.codes >= 0) & (other.codes >= 0)
    only_one = int(np.sum(both & (one.codes == 0) & (other.codes == 1)))
    only_other = int(np.sum(both & (one.codes == 1) & (other.codes == 0)))
    return only_one if sign_test(only_one, only_other) < SIGNIFICANCE else 0


def sign_test(b: int, c: int) -> float:
    """P(X >= b), X ~ Bin(b + c, 1/2): how probable it is that chance favours b so much. 1 for b = c = 0."""
    n = b + c
    return float(Fraction(sum(math.comb(n, k) for k in range(b, n + 1)), 2**n))
