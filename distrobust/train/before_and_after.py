"""The end of a run: clean and PGD accuracy on the test file, of the model before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.comm.transport import Transport
from distrobust.config import Config
from distrobust.data import Source
from distrobust.train import scoring, sources
from distrobust.train.agree import on_all_ranks
from distrobust.train.modelfile import load_model_file
from distrobust.train.step import ball


def evaluate(
    config: Config,
    models: dict[str, Path],
    make: Callable[[], nn.Module],
    test: Source,
    emit: Callable[[dict[str, Any]], None],
    beat: Callable[[], None],
) -> None:
    """Emits a record for each of the model files, read into a model of `make`, and each attack.

    Every rank takes its part of the rows, and beats with each of its batches.
    """
    settings, attack = config.evaluate, config.attack
    shard = on_all_ranks(lambda: sources.shard(config, test, dist.get_rank(), dist.get_world_size(), None))
    attacks: list[tuple[Attack, Threat | None, int]] = [(scoring.NATURAL, None, 0)]
    if attack is not None:
        eps = attack.eps if settings.eps is None else settings.eps
        threat = ball(attack.norm, eps, config.model.reads_text)
        attacks.append((Attack("pgd", steps=settings.steps), threat, settings.images))
    for label, path in models.items():
        net = make()
        on_all_ranks(partial(load_model_file, net, path))
        net.eval()
        for chosen, within, limit in attacks:
            result = scoring.distributed_score(
                net,
                shard,
                chosen,
                within,
                limit=limit,
                batch_size=settings.batch_size,
                seed=config.run.seed,
                transport=Transport(),
                beat=beat,
            )
            emit(
                {
                    "event": "evaluation",
                    "model": label,
                    "attack": result.attack,
                    "accuracy": result.accuracy,
                    "low": result.low,
                    "high": result.high,
                    "samples": result.samples,
                    "seed": result.seed,
                    "seconds": result.seconds,
                    "flags": list(result.flags),
                }
            )
