"""The sweep of `distrobust ensemble`: every mixture of two model files, measured on held-out rows, one chosen there.

The choice is made on the rows that the run of the fine-tuned model held out, by the mean of clean accuracy and robust
accuracy at the first budget. The test file is read afterwards, for the chosen mixture and both ends only, so that its
numbers are not the best of many.

    DIR/ensemble.json     everything measured
    DIR/ensemble-A.pt     a mixture as a model file, on request
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distrobust import __version__, data
from distrobust import config as configuration
from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.threat import Threat
from distrobust.data import Shard, Source
from distrobust.errors import ConfigError, ModelError
from distrobust.evaluation.accuracy import Score, score
from distrobust.evaluation.counting import count_correct
from distrobust.evaluation.ensemble import Statistics, interpolate, reestimate_
from distrobust.train.modelfile import build_model, read_model_file, refuse_text, save_model_file
from distrobust.train.rundir import write_atomically
from distrobust.train.scoring import spaced_rows
from distrobust.train.sources import describe_as_trained

RECORD = "ensemble.json"
_BATCH = 250
_STATISTICS_BATCHES = 8  # of training images, for batch-norm statistics
_STATISTICS_STEPS = 5  # of the PGD that makes those adversarial
_HELD_OUT = 0.02  # of a model whose run is not known


@dataclass(frozen=True)
class Settings:
    """What to measure. threats: the first one decides. images: attacked in each of held-out rows and test file, 0: all.

    held_out, seed: of the split into training and held-out rows; None: those of the run the fine-tuned model lies in.
    write: the share of a mixture to write, or "best".
    """

    pretrained: Path
    finetuned: Path
    data: Path
    threats: Sequence[Threat]
    num_alphas: int = 11
    steps: int = 20
    images: int = 0
    statistics: Statistics = "none"
    held_out: float | None = None
    seed: int | None = None
    out: Path | None = None
    write: float | str | None = None


@dataclass(frozen=True)
class Point:
    """A mixture with its scores: clean, then under attack, one a threat."""

    a: float
    scores: tuple[Score, ...]

    @property
    def merit(self) -> float:
        """What is chosen by: mean of clean and robust accuracy, the latter under the first threat."""
        return (self.scores[0].accuracy + self.scores[1].accuracy) / 2


def sweep(settings: Settings) -> Iterator[str]:
    """Lines of text as they become known; writes the record, and the mixture if one is wanted, at the end.

    Raises ConfigError, DataError, and ModelError for files that are missing, damaged or of two models.
    """
    _check(settings)
    before, after = read_model_file(settings.pretrained), read_model_file(settings.finetuned)
    refuse_text(after, settings.finetuned)
    _check_alike(settings, before, after)
    mixer = _Mixer.of(settings, before, after)
    yield mixer.describe_split()
    yield _head(settings)
    points: list[Point] = []
    for number in range(settings.num_alphas):
        points.append(mixer.measure(number / (settings.num_alphas - 1), mixer.held_out))
        yield _line(points[-1])
    chosen = max(points, key=lambda point: (point.merit, point.a))
    yield (
        f"chosen: a = {chosen.a:g}, the highest mean of clean and {chosen.scores[1].attack} accuracy on held-out rows; "
        "test file, which had no part in it:"
    )
    tested = []
    for a in dict.fromkeys((0.0, chosen.a, 1.0)):
        tested.append(mixer.measure(a, mixer.test))
        yield _line(tested[-1])
    if flags := sorted({flag for point in tested for one in point.scores for flag in one.flags}):
        yield f"[{'; '.join(flags)}]"
    if settings.out is None:
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    record = _record(settings, mixer, points, chosen, tested)
    write_atomically(settings.out / RECORD, json.dumps(record, indent=1))
    yield f"written: {settings.out / RECORD}"
    if settings.write is not None:
        a = chosen.a if isinstance(settings.write, str) else settings.write
        path = settings.out / f"ensemble-{a:g}.pt"
        save_model_file(path, mixer.mixed(a), after["model"], mixer.test.source)
        yield f"written: {path}"


def command(
    pretrained: Path,
    finetuned: Path,
    data_path: Path,
    eps: Sequence[str],
    norm: str,
    num_alphas: int,
    write: str | None,
    threads: int,
    **others: Any,
) -> Iterator[str]:
    """The lines of `distrobust ensemble`. eps: as in a configuration, such as 8/255. others: as in Settings."""
    if threads:
        torch.set_num_threads(threads)
    threats = []
    for text in eps:
        values = {"data": {"path": data_path}, "attack": {"norm": norm, "eps": text}}
        parsed = configuration.parse(values, "--eps").attack
        assert parsed is not None
        threats.append(Threat(parsed.norm, parsed.eps))
    share: float | str | None = write
    if write is not None and write != "best":
        try:
            share = float(write)
        except ValueError:
            raise ConfigError(f"ensemble --write: got {write!r}, wanted a share from 0 to 1, or best") from None
    yield from sweep(Settings(pretrained, finetuned, data_path, threats, num_alphas=num_alphas, write=share, **others))


@dataclass
class _Mixer:
    """Two states, the rows to measure on, and one network to put their mixtures into."""

    settings: Settings
    before: dict[str, Any]
    after: dict[str, Any]
    net: nn.Module
    train: Shard
    held_out: Shard
    test: Shard
    split: tuple[float, int]
    warning: str

    @staticmethod
    def of(settings: Settings, before: dict[str, Any], after: dict[str, Any]) -> _Mixer:
        theirs, others = _split_of(settings.finetuned), _split_of(settings.pretrained)
        fraction, seed = theirs or (_HELD_OUT, 0)
        split = (settings.held_out or fraction, seed if settings.seed is None else settings.seed)
        warning = ""
        if theirs is None:
            warning = "the run of the fine-tuned model is not known: give its --held-out and --seed"
        for name, known in (("fine-tuned", theirs), ("pre-trained", others)):
            if known is not None and known != split:
                warning = f"the {name} model learned from some of them: its run held out {known[0]:g}, seed {known[1]}"
        source = describe_as_trained(settings.data, "train", after)
        _check_shape(settings, source, after)
        rows = data.split_held_out(source, *split)
        train, held_out = (Shard(source, 0, 1, split[1], rows=part) for part in rows)
        test = Shard(describe_as_trained(settings.data, "test", after), 0, 1, split[1])
        net = build_model(after["model"], source, seed=0).eval()
        return _Mixer(settings, before, after, net, train, held_out, test, split, warning)

    def describe_split(self) -> str:
        fraction, seed = self.split
        text = f"{self.held_out.total_rows} held-out rows: {fraction:g} of the training file, by seed {seed}"
        return f"{text}; warning: {self.warning}" if self.warning else text

    def mixed(self, a: float) -> nn.Module:
        """The network, holding the mixture."""
        settings = self.settings
        self.net.load_state_dict(interpolate(self.before["state"], self.after["state"], a))
        if settings.statistics != "none":
            attacked = settings.statistics == "adversarial"
            batch = min(_BATCH, self.train.total_rows)
            batches = itertools.islice(self.train.batches(0, batch), _STATISTICS_BATCHES)
            attack = Attack("pgd", steps=_STATISTICS_STEPS) if attacked else None
            reestimate_(self.net, batches, attack, settings.threats[0] if attacked else None, self.split[1])
        return self.net

    def measure(self, a: float, rows: Shard) -> Point:
        settings, seed, net = self.settings, self.split[1], self.mixed(a)
        clean = count_correct(net, spaced_rows(rows, 0, _BATCH), None, None, seed)
        scores = [score(clean, None, None, seed)]
        attack = Attack("pgd", steps=settings.steps)
        for threat in settings.threats:
            counts = count_correct(net, spaced_rows(rows, settings.images, _BATCH), attack, threat, seed)
            scores.append(score(counts, attack, threat, seed))
        return Point(a, tuple(scores))


def _split_of(path: Path) -> tuple[float, int] | None:
    """(data.held_out, run.seed) of the run of `train` in whose models/ the file lies; None if there is no such run."""
    file = path.absolute().parent.parent / "config.yaml"
    if not file.exists():
        return None
    try:
        config = configuration.load(file)
    except ConfigError:
        return None
    return config.data.held_out, config.run.seed


def _check(settings: Settings) -> None:
    if settings.num_alphas < 2:
        raise ConfigError(f"ensemble --alphas: got {settings.num_alphas}, wanted at least 2, for both ends")
    if not settings.threats:
        raise ConfigError("ensemble --eps: got none, wanted at least one budget")
    if settings.write is not None and settings.out is None:
        raise ConfigError("ensemble --write: wanted --out DIR beside it, for the model file")
    if isinstance(settings.write, float) and not 0.0 <= settings.write <= 1.0:
        raise ConfigError(f"ensemble --write: got {settings.write:g}, wanted a share from 0 to 1, or best")


def _check_alike(settings: Settings, before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("model", "classes", "shape"):
        if before[key] != after[key]:
            both = "descriptions of a library" if isinstance(after[key], dict) else f"{before[key]} and {after[key]}"
            raise ModelError(
                f"{settings.pretrained} and {settings.finetuned} are not of one model: {key} differs ({both}); give a "
                "model before and after fine-tuning"
            )
    interpolate(before["state"], after["state"], 0.5)  # names and shapes, before anything is measured


def _check_shape(settings: Settings, source: Source, after: dict[str, Any]) -> None:
    if list(source.shape) != after["shape"]:
        raise ModelError(
            f"{settings.finetuned} was trained on images of shape {tuple(after['shape'])}, those in {settings.data} "
            f"are {source.shape} (channels, height, width)"
        )


def _head(settings: Settings) -> str:
    attacks = (Attack("pgd", steps=settings.steps).describe(threat) for threat in settings.threats)
    return "     a  " + "".join(f"{name:<26}" for name in ("clean", *attacks)).rstrip() + "   (95 % interval)"


def _line(point: Point) -> str:
    cells = (f"{100 * s.accuracy:5.1f} % ({100 * s.low:.1f} .. {100 * s.high:.1f})" for s in point.scores)
    return f"{point.a:6.3g}  " + "".join(f"{cell:<26}" for cell in cells).rstrip()


def _record(
    settings: Settings, mixer: _Mixer, points: Sequence[Point], chosen: Point, tested: Sequence[Point]
) -> dict[str, Any]:
    return {
        "pretrained": str(settings.pretrained),
        "finetuned": str(settings.finetuned),
        "data": str(settings.data),
        "statistics": settings.statistics,
        "held_out": {"share": mixer.split[0], "seed": mixer.split[1], "rows": mixer.held_out.total_rows},
        "warning": mixer.warning,
        "chosen_by": f"mean of clean and {chosen.scores[1].attack} accuracy on held-out rows",
        "chosen": chosen.a,
        "points": [asdict(point) for point in points],
        "test": [asdict(point) for point in tested],
        "versions": {"distrobust": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
