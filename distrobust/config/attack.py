"""The adversary of the fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from distrobust.config.section import (
    AsFraction,
    Budget,
    Count,
    Positive,
    Section,
    Share,
)


class AttackConfig(Section):
    name: Literal["fgsm", "n_fgsm", "pgd", "free"] = "n_fgsm"
    """How training examples are made during the `train` phase; free: by the steps' own backward passes."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Of the ball around an image, or around the embedding of a text: then linf, or l2 of all of it together."""
    eps: Budget = 8 / 255
    """Budget, inputs in [0, 1]; may be written 8/255. Of text: the entries of its embedding have variance 1."""
    steps: Count = 10
    """pgd only."""
    first_steps: Count | None = None
    """pgd only: steps at the start of the phase, rising linearly to `steps`; null: `steps` from the start."""
    replays: Count = 8
    """free only: how many steps in a row each batch is trained on; an epoch has as many times more steps."""
    step_size: Annotated[Positive, AsFraction] | None = None
    """null: 2.5 eps / steps for pgd, eps for fgsm and n_fgsm, the paper's for TRADES."""
    ramp: Share = 0.0
    """eps rises linearly from 0 over this share of the phase."""
    loss: Literal["pgd_at", "trades", "mart"] = "pgd_at"
    """pgd_at: cross-entropy on adversarial examples; trades: clean cross-entropy plus beta times a robust term;
    mart: adversarial cross-entropy, its margin, and beta times a robust term where the clean example is in doubt."""
    beta: Positive | None = None
    """trades and mart only: weight of the robust term; null: the papers', 6 and 5."""
    awp: Positive | None = None
    """Adversarial weight perturbation by this share of each layer's norm (the paper's: 0.01, trades 0.005)."""
    watch_every: Count | None = None
    """Steps between looks for catastrophic overfitting (FGSM against PGD-10 on held-out images), besides the end of
    each epoch; null: only there."""
    on_collapse: Literal["report", "stop", "pgd"] = "report"
    """What follows when it is seen; pgd: train on against PGD with `steps` steps."""

    @model_validator(mode="after")
    def _fits(self) -> AttackConfig:
        if self.first_steps is not None and (self.name != "pgd" or self.first_steps > self.steps):
            raise ValueError(f"first_steps goes with name pgd and is at most steps ({self.steps})")
        if self.name == "free" and (self.loss != "pgd_at" or self.step_size is not None):
            raise ValueError("free takes its examples from the training step itself: loss pgd_at, step_size null")
        if self.beta is not None and self.loss == "pgd_at":
            raise ValueError("beta goes with loss trades or mart")
        return self
