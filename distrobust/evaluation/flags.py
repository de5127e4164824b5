"""Reasons to distrust an accuracy, each with what to do about it.

After auto-attack's page on reasons for distrust, and Carlini et al. 2019, "On evaluating adversarial
robustness". The first four need only counts; checks.py raises the others from what attacks found.

| flag | raised when |
| --- | --- |
| few samples | fewer than 1000 images |
| zero gradients | an image's input gradient is all zero |
| non-finite gradients | an input gradient has NaN or infinity |
| training mode | the model came in training mode |
| no gradients | the output does not depend on the input in a way that torch can differentiate |
| randomised model | two forward passes over the same images differ |
| probabilities | the output is a probability distribution, not logits |
| accuracy at a large budget | some are still right where the ball holds a grey image, the same for all classes |
| not converged | PGD with five times the steps breaks more images |
| black box beats white box | an attack without the model's gradients breaks more than one with them |
| second opinion disagrees | another library's PGD breaks more than ours |
| outside the ball | a library returned images that are too far away; they were not counted against the model |
| black box not tried | the library for it is not installed |

Images outside [0, 1] are no flag but a DataError: no number would mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_SAMPLES = 1000


@dataclass(frozen=True)
class Flag:
    """str() gives 'name: reason'. remedy: what to do, a phrase."""

    name: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def few_samples(num: int) -> Flag:
    return Flag(
        "few samples",
        f"{num}, fewer than {MIN_SAMPLES}",
        "evaluate more images; until then the interval says how far off the number may be",
    )


def zero_gradients(num: int, samples: int) -> Flag:
    return Flag(
        "zero gradients",
        f"the input gradient of {num} of {samples} images is zero everywhere",
        "trust only attacks without gradients (square, transfer) on them; attack a smooth version of whatever rounds "
        "or saturates, or a loss on the logits' differences (autoattack)",
    )


def nonfinite_gradients(num: int, samples: int) -> Flag:
    return Flag(
        "non-finite gradients",
        f"in the input gradient of {num} of {samples} images",
        "gradient attacks are blind there: look for a logarithm, root or division at 0 in the model; try square",
    )


def training_mode() -> Flag:
    return Flag(
        "training mode",
        "the model was given in training mode and evaluated in evaluation mode",
        "call eval() before evaluating, and check the code that handed it over",
    )
