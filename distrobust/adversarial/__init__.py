"""Attack: norm balls, attacks, training losses, what makes attacks fast. Measuring is in distrobust.evaluation."""

from distrobust.adversarial.attacks import Attack, fgsm, n_fgsm, pgd
from distrobust.adversarial.awp import perturbed_weights
from distrobust.adversarial.losses import MART, PGDAT, TRADES, TRADES_ATTACK, LossOutput, Natural, TrainingLoss
from distrobust.adversarial.threat import Threat, ascend, project, random_start

__all__ = [
    "MART",
    "PGDAT",
    "TRADES",
    "TRADES_ATTACK",
    "Attack",
    "LossOutput",
    "Natural",
    "Threat",
    "TrainingLoss",
    "ascend",
    "fgsm",
    "n_fgsm",
    "perturbed_weights",
    "pgd",
    "project",
    "random_start",
]
