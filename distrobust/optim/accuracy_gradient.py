"""AccelAT: cut the learning rate when validation accuracy stops rising.

Nikfam, Marchisio, Martina, Shafique, 2022, arXiv 2210.06888, as in the authors' code. After every epoch, with A the
mean of the last `window` accuracies:

    if epochs > window and epochs since the last cut >= patience and A - A_previous < threshold: rate <- factor rate

never below `floor`. Difference: it multiplies whatever schedule the run has, where the paper's is constant.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class AccuracyGradient:
    """`update` after every epoch, `rate` at every step. Accuracies are shares. Defaults: the paper's."""

    window: int = 5
    patience: int = 5
    threshold: float = 0.005
    factor: float = 0.8
    floor: float = 1e-6
    accuracies: list[float] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)  # number of epochs after which the rate was cut

    def update(self, accuracy: float) -> bool:
        """An epoch ended with this accuracy. Whether the rate is cut from here on."""
        self.accuracies.append(accuracy)
        epochs = len(self.accuracies)
        waited = epochs - self.cuts[-1] if self.cuts else epochs
        if epochs <= self.window or waited < self.patience:
            return False
        rise = (self.accuracies[-1] - self.accuracies[-1 - self.window]) / self.window  # A - A_previous
        if rise >= self.threshold:
            return False
        self.cuts.append(epochs)
        return True

    def rate(self, scheduled: float) -> float:
        """What is left of a scheduled rate; not below the floor, unless the schedule itself is."""
        return min(scheduled, max(self.floor, scheduled * self.factor ** len(self.cuts)))

    def state_dict(self) -> dict[str, Any]:
        return {"accuracies": list(self.accuracies), "cuts": list(self.cuts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accuracies, self.cuts = list(state["accuracies"]), list(state["cuts"])
