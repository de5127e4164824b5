"""Which trials an evaluation consists of.

    pgd          our PGD with restarts, the number everybody compares
    autoattack   APGD-CE, APGD-T, FAB-T and Square, each on what the ones before left standing
    foolbox      another implementation of PGD, as a second opinion
    square       Square alone, 5000 queries: the only one that needs no gradients
    curve        PGD over growing budgets, for accuracy against eps
    transfer     PGD examples made on another model

`clean` comes first, and a look at the model (`probe`) after it. Unless switched off, evenly spaced
CHECK_IMAGES images are attacked three times more, to see whether PGD's number can be believed: with five times
the steps, in a ball so large that it holds a grey image, and by a short Square attack. checks.py judges them.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from distrobust.adversarial.threat import Threat
from distrobust.errors import ConfigError
from distrobust.evaluation.libraries import MIN_CLASSES, AutoAttackPart, is_installed, require
from distrobust.evaluation.trial import Trial

Name = Literal["pgd", "autoattack", "foolbox", "square", "curve", "transfer"]
CURVE = (1 / 4, 1 / 2, 3 / 4, 1.0, 3 / 2, 2.0)  # default budgets of the curve, in units of eps
CHECK_IMAGES = 256
MORE_STEPS = 5  # times as many, in the check of convergence
CHECK_QUERIES = 300
SQUARE_QUERIES = 5000  # AutoAttack's
APGD_STEPS = 100  # AutoAttack's


@dataclass(frozen=True)
class Suite:
    """What to attack with; valid by construction, or ConfigError. threat.eps must be above 0.

    attacks: names above, in any order; `transfer` needs a source model where it runs. steps, restarts: of our
    PGD, and of foolbox's steps. curve: budgets, in image units; empty: CURVE times eps. checks: the three
    attacks more.
    """

    threat: Threat
    attacks: tuple[str, ...] = ("pgd",)
    steps: int = 20
    restarts: int = 1
    curve: tuple[float, ...] = ()
    checks: bool = True

    def __post_init__(self) -> None:
        for name in self.attacks:
            if name not in get_args(Name):
                closest = difflib.get_close_matches(name, get_args(Name), n=1, cutoff=0.4)
                hint = f"did you mean {closest[0]!r}? " if closest else ""
                raise ConfigError(f"attacks: {name!r}; {hint}valid: {', '.join(get_args(Name))}")
        for name, number in (("steps", self.steps), ("restarts", self.restarts)):
            if number < 1:
                raise ConfigError(f"{name}: got {number}, wanted at least 1")
        for eps in (self.threat.eps, *self.curve):
            if replace(self.threat, eps=eps).eps == 0:
                raise ConfigError("eps: got 0, wanted more; clean accuracy is always measured")
        if {"autoattack", "square"} & set(self.attacks):
            require("pyautoattack")
        if "foolbox" in self.attacks:
            require("foolbox")

    @property
    def budgets(self) -> tuple[float, ...]:
        """Of the curve, ascending; none if there is no curve."""
        if "curve" not in self.attacks:
            return ()
        largest = 1.0 if self.threat.norm == "linf" else math.inf
        default = (factor * self.threat.eps for factor in CURVE)
        return tuple(sorted(set(self.curve) or {min(eps, largest) for eps in default}))

    def trials(self, num_images: int, num_classes: int, image_shape: tuple[int, ...]) -> tuple[Trial, ...]:
        """In an order in which each comes after those it names. Raises ConfigError for too few classes."""
        if "autoattack" in self.attacks and num_classes < MIN_CLASSES:
            raise ConfigError(
                f"attacks: autoattack needs at least {MIN_CLASSES} classes, the data set has {num_classes}; "
                "use pgd,square"
            )
        clean = Trial("clean")
        trials = [clean, Trial("probe", role="check")]
        pgd = Trial("pgd", self.threat, self.steps, self.restarts, after=(clean.key,))
        if "pgd" in self.attacks:
            trials.append(pgd)
        trials += self._independent(clean)
        trials += self._curve(clean, pgd)
        if self.checks and "pgd" in self.attacks:
            every = max(1, num_images // CHECK_IMAGES)
            trials += self._checks(pgd, every, math.prod(image_shape))
        return tuple(trials)

    def _independent(self, clean: Trial) -> Iterator[Trial]:
        before: tuple[str, ...] = (clean.key,)
        one = Trial("foolbox", self.threat, self.steps, after=before)
        if "foolbox" in self.attacks:
            yield one
        if "transfer" in self.attacks:
            yield replace(one, kind="transfer", restarts=self.restarts)
        if "square" in self.attacks:
            yield replace(one, kind="square", steps=SQUARE_QUERIES)
        if "autoattack" in self.attacks:
            for part in get_args(AutoAttackPart):
                steps = SQUARE_QUERIES if part == "square" else APGD_STEPS
                trial = replace(one, kind=part, steps=steps, after=before)
                before = (*before, trial.key)
                yield trial

    def _curve(self, clean: Trial, pgd: Trial) -> Iterator[Trial]:
        """Ascending: what falls at a budget has fallen at every larger one."""
        before: tuple[str, ...] = (clean.key,)
        for eps in self.budgets:
            done = eps == self.threat.eps and "pgd" in self.attacks
            if done:
                before = (*before, pgd.key)
            restarts = 0 if done else self.restarts  # the same attack again would find nothing new
            trial = Trial("pgd", replace(self.threat, eps=eps), self.steps, restarts, after=before, role="curve")
            before = (*before, trial.key)
            yield trial

    def _checks(self, pgd: Trial, every: int, num_entries: int) -> Iterator[Trial]:
        check = replace(pgd, every=every, role="check")
        yield replace(check, steps=MORE_STEPS * self.steps)
        large = grey_budget(self.threat, num_entries)
        if large.eps > self.threat.eps:
            yield replace(check, threat=large, restarts=1, after=(*check.after, pgd.key))
        if is_installed("pyautoattack"):
            yield replace(check, kind="square", steps=CHECK_QUERIES, restarts=1)


def grey_budget(threat: Threat, num_entries: int) -> Threat:
    """The smallest ball around any image that holds the grey image: 1/2 in Linf, sqrt(d)/2 in L2, d/2 in L1.

    No classifier is right on grey images of two classes, so robust accuracy there is that of one class at most,
    and a working attack brings it to about zero.
    """
    return replace(threat, eps={"linf": 0.5, "l2": math.sqrt(num_entries) / 2, "l1": num_entries / 2}[threat.norm])


def parse_budget(text: str) -> float:
    """'8/255' and '0.03' -> a number; ConfigError for anything else."""
    try:
        value = float(Fraction(text.replace(" ", ""))) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"eps: got {text!r}, wanted a number or a fraction such as 8/255")
    return value


def parse_names(text: str, *, transfer: bool) -> tuple[str, ...]:
    """'pgd,foolbox' or 'all' -> names in the order of the module's list. transfer: there is a source model."""
    names = {part.strip().lower() for part in text.split(",")} - {""}
    possible = [name for name in get_args(Name) if name != "transfer" or transfer]
    wanted = set(possible) if "all" in names else names | ({"transfer"} if transfer else set())
    if "transfer" in wanted and not transfer:
        raise ConfigError("attacks: transfer needs another model to make examples on; give it with --source")
    unknown = sorted(wanted - set(get_args(Name)) - {"all"})
    return tuple(itertools.chain((n for n in possible if n in wanted), unknown))  # Suite names the unknown ones
