"""Attack and measure: norm balls, attacks, training losses, clean and robust accuracy."""

from distrobust.adversarial.accuracy import Counts, Score, score, wilson
from distrobust.adversarial.attacks import Attack, fgsm, n_fgsm, pgd
from distrobust.adversarial.awp import perturbed_weights
from distrobust.adversarial.evaluate import count_correct, foolbox_pgd
from distrobust.adversarial.evaluation import Evaluation, run
from distrobust.adversarial.flags import Flag
from distrobust.adversarial.losses import MART, PGDAT, TRADES, TRADES_ATTACK, LossOutput, Natural, TrainingLoss
from distrobust.adversarial.suite import Suite
from distrobust.adversarial.threat import Threat, ascend, project, random_start

__all__ = [
    "MART",
    "PGDAT",
    "TRADES",
    "TRADES_ATTACK",
    "Attack",
    "Counts",
    "Evaluation",
    "Flag",
    "LossOutput",
    "Natural",
    "Score",
    "Suite",
    "Threat",
    "TrainingLoss",
    "ascend",
    "count_correct",
    "fgsm",
    "foolbox_pgd",
    "n_fgsm",
    "perturbed_weights",
    "pgd",
    "project",
    "random_start",
    "run",
    "score",
    "wilson",
]
