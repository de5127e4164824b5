"""Attack and measure: norm balls, attacks, training losses, clean and robust accuracy."""

from distrobust.adversarial.accuracy import Counts, Score, score, wilson
from distrobust.adversarial.attacks import Attack, fgsm, n_fgsm, pgd
from distrobust.adversarial.evaluate import count_correct, foolbox_pgd
from distrobust.adversarial.evaluation import Evaluation, run
from distrobust.adversarial.flags import Flag
from distrobust.adversarial.losses import TRADES_ATTACK, LossOutput, natural, pgd_at, trades
from distrobust.adversarial.suite import Suite
from distrobust.adversarial.threat import Threat, ascend, project, random_start

__all__ = [
    "TRADES_ATTACK",
    "Attack",
    "Counts",
    "Evaluation",
    "Flag",
    "LossOutput",
    "Score",
    "Suite",
    "Threat",
    "ascend",
    "count_correct",
    "fgsm",
    "foolbox_pgd",
    "n_fgsm",
    "natural",
    "pgd",
    "pgd_at",
    "project",
    "random_start",
    "run",
    "score",
    "trades",
    "wilson",
]
