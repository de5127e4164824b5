"""Evaluates a model file on a data set, in one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from distrobust import data
from distrobust.adversarial.accuracy import Score, score
from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.evaluate import count_correct, foolbox_pgd
from distrobust.adversarial.threat import Norm, Threat
from distrobust.errors import ModelError
from distrobust.train.modelfile import build_model, load_model_file, read_model_file
from distrobust.train.scoring import spaced_rows


def evaluate_file(
    path: Path,
    data_path: Path,
    norm: Norm,
    eps: float,
    steps: int,
    images: int,
    seed: int,
    independent: bool,
    threads: int,
) -> Iterator[Score]:
    """Clean accuracy on all test images, then PGD on `images` of them (0: all), evenly spaced, then foolbox's if asked.

    Raises ModelError if the file does not fit its own description or the data set, DataError, ConfigError.
    """
    if threads:
        torch.set_num_threads(threads)
    content = read_model_file(path)
    source = data.describe(data_path, "test", channels=content["shape"][0], classes=content["classes"])
    if list(source.shape) != content["shape"]:
        raise ModelError(
            f"{path} was trained on images of shape {tuple(content['shape'])}, those in {data_path} are "
            f"{source.shape} (channels, height, width)"
        )
    net = build_model(content["model"], source, seed=0)
    load_model_file(net, path)
    net.eval()
    shard = data.Shard(source, 0, 1, seed=0)
    batch_size = 250

    yield score(count_correct(net, spaced_rows(shard, 0, batch_size), None, None, seed), None, None, seed)
    attack, threat = Attack("pgd", steps=steps), Threat(norm, eps)
    counts = count_correct(net, spaced_rows(shard, images, batch_size), attack, threat, seed, indices=itertools.count())
    yield score(counts, attack, threat, seed)
    if independent:
        counts = foolbox_pgd(net, spaced_rows(shard, images, batch_size), eps, steps, norm=norm, seed=seed)
        yield score(counts, attack, threat, seed, library="foolbox")
