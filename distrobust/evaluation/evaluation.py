"""From the verdicts of an evaluation to everything that is said about it.

`run` does it all in one process, for a model and batches at hand; `summary` for verdicts collected elsewhere
(train/evaluation.py shares batches out over processes and keeps verdicts in a directory).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distrobust.evaluation.checks import concerning, reasons_for_distrust
from distrobust.evaluation.finding import (
    ExpectedRobustness,
    Finding,
    Result,
    expected_robustness,
    result,
    worst_case,
)
from distrobust.evaluation.flags import Flag
from distrobust.evaluation.suite import Suite
from distrobust.evaluation.trial import Trial, Verdict, attempt

Done = Mapping[tuple[str, int], Verdict]  # (trial's key, batch number) -> verdict


@dataclass(frozen=True)
class Evaluation:
    """results: in the order of the trials, the worst case over all attacks at the suite's budget after them.
    expected: None without a curve. flags: with their remedies; each result repeats those that concern it.
    seconds, forward_images, backward_images: of everything, the probe included, added over processes."""

    results: tuple[Result, ...]
    expected: ExpectedRobustness | None
    flags: tuple[Flag, ...]
    seconds: float
    forward_images: int
    backward_images: int


def run(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    suite: Suite,
    *,
    num_classes: int,
    seed: int = 0,
    source: nn.Module | None = None,
) -> Evaluation:
    """Evaluates `model` (inner module) on `batches`: (images (B, C, H, W) uint8 or float in [0, 1], labels (B,)).

    source: for transfer. Raises ConfigError for a suite that does not fit, DataError, ModelError.
    """
    training_mode = any(module.training for module in model.modules())
    labels = torch.cat([y for _, y in batches]).cpu().numpy().astype(np.int64)
    trials = suite.trials(len(labels), num_classes, tuple(batches[0][0].shape[1:]))
    done: dict[tuple[str, int], Verdict] = {}
    for trial in trials:
        first = 0
        for index, (x, y) in enumerate(batches):
            done[trial.key, index] = attempt(
                trial,
                model,
                x,
                y,
                seed=seed,
                index=index,
                first=first,
                standing=standing(trial, index, done),
                source=source,
            )
            first += len(y)
    return summary(trials, done, labels, num_classes, seed, training_mode=training_mode)


def standing(trial: Trial, index: int, done: Done) -> Tensor | None:
    """(B,) bool: the images of batch `index` that no trial of `trial.after` brought down; None if none did."""
    before = [done[key, index].right for key in trial.after]
    if not before:
        return None
    return torch.tensor(["0" not in codes for codes in zip(*before, strict=True)])


def summary(
    trials: Sequence[Trial],
    done: Done,
    labels: NDArray[np.int64],
    num_classes: int,
    seed: int,
    *,
    training_mode: bool = False,
) -> Evaluation:
    """done: the verdicts of all `trials` on all batches, whose images have `labels` (n,) in order."""
    num_batches = 1 + max((index for _, index in done), default=-1)
    findings = [
        Finding(trial, tuple(done[trial.key, index] for index in range(num_batches)), labels) for trial in trials
    ]
    raised = reasons_for_distrust(findings, training_mode=training_mode)
    shown = [finding for finding in findings if finding.trial.kind != "probe"]
    results = [result(f, seed, num_classes, concerning(f, raised)) for f in shown]
    attacks = [f for f in findings if f.trial.role == "attack" and f.trial.threat is not None]
    if len(attacks) > 1:
        worst = worst_case(attacks)
        assert worst.trial.threat is not None
        name = f"all attacks {worst.trial.threat.describe()}"
        results.append(result(worst, seed, num_classes, concerning(worst, raised), name))
    clean = next(f for f in findings if f.trial.kind == "clean")
    curve = [f for f in findings if f.trial.role == "curve"]
    verdicts = [verdict for finding in findings for verdict in finding.verdicts]
    return Evaluation(
        tuple(results),
        expected_robustness(clean, curve),
        raised,
        seconds=sum(verdict.seconds for verdict in verdicts),
        forward_images=sum(verdict.forward for verdict in verdicts),
        backward_images=sum(verdict.backward for verdict in verdicts),
    )
