"""Attacks of other libraries on one batch: foolbox's PGD and the four of AutoAttack (pyautoattack).

    APGD-CE, APGD-T, FAB-T, Square      Croce and Hein 2020, "Reliable evaluation of adversarial robustness",
                                        Croce and Hein 2020 (FAB), Andriushchenko et al. 2020 (Square)

A second implementation is worth more than a second run of our own. Both libraries draw from torch's global
generators and call backward(): the caller seeds and restores the generators and freezes the parameters
(`settled` in counting.py). x: (B, C, H, W) float32 in [0, 1]; y: (B,) int64; the answer has x's shape.

AutoAttack's standard version runs the four one after another, each on the images that still stand. Here each
is called by itself, with the standard version's settings, so that its result can be kept on its own; a test
holds the four in a row against the library's own run. Not run are the library's checks of the model, which
spend forward passes and switch tracing off (sys.settrace); checks.py has them. With fewer than ten classes
the targeted attacks aim at all the others instead of nine; below MIN_CLASSES their loss is not defined.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distrobust.adversarial.threat import Threat
from distrobust.errors import ConfigError

AutoAttackPart = Literal["apgd-ce", "apgd-t", "fab-t", "square"]
MIN_CLASSES = 4  # the targeted DLR loss needs four logits
_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def is_installed(library: Literal["foolbox", "pyautoattack"]) -> bool:
    return importlib.util.find_spec(library) is not None


def require(library: Literal["foolbox", "pyautoattack"]) -> None:
    """ConfigError, with what to do, unless it can be imported."""
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise ConfigError(f"evaluation: {library} is not installed; pip install 'distrobust[evaluation]'") from error


def foolbox_examples(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, steps: int) -> Tensor:
    """foolbox's PGD with random start. The step is eps / 4, given explicitly: foolbox's default (eps / 30 for
    40 steps) moves too little in few steps and reports false robustness."""
    import foolbox
    from foolbox.models.pytorch import PyTorchModel

    make = getattr(foolbox.attacks, f"{_NORMS[threat.norm]}PGD")
    attack = make(abs_stepsize=threat.eps / 4, steps=steps, random_start=True)
    wrapped = PyTorchModel(model, bounds=(0, 1), device=x.device)
    x_adv: Tensor = attack.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=threat.eps)
    return x_adv


@torch.no_grad()
def autoattack_examples(
    model: nn.Module, x: Tensor, y: Tensor, threat: Threat, part: AutoAttackPart, seed: int, queries: int = 5000
) -> Tensor:
    """One of AutoAttack's attacks. The model must be right on every image of x. queries: of square only."""
    from pyautoattack import AutoAttack

    suite = AutoAttack(model, norm=_NORMS[threat.norm], eps=threat.eps, seed=seed, device=x.device)
    others = model(x[:1]).shape[1] - 1
    for targeted in (suite.apgd_targeted, suite.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, others)
    suite.apgd.loss, suite.fab.targeted, suite.square.n_queries = "ce", True, queries
    attacks: dict[str, Any] = {
        "apgd-ce": suite.apgd,
        "apgd-t": suite.apgd_targeted,
        "fab-t": suite.fab,
        "square": suite.square,
    }
    attack = attacks[part]
    attack.seed = seed
    with contextlib.redirect_stdout(io.StringIO()):  # its warnings are our flags
        x_adv: Tensor = attack.perturb(x.clone(), y.clone())
    return x_adv.detach()
