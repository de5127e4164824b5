"""Which layers to freeze, and how fast to train the others: an evolutionary search, after P-Transfer.

P-Transfer (Shen et al., AAAI 2021) searches over which layers of a pre-trained model are fine-tuned, and at which rate,
by the validation accuracy after a short fine-tuning. Here a candidate is one multiplier of `model.rates` for each group
of layers; its fitness is the robust accuracy on the held-out rows (the clean one without an attack) at the end of a run
of the ordinary job, one rank in this process. The test file is never evaluated.

The first candidate trains every layer at the full rate. A generation's children have two parents out of the better half
of all candidates so far, each multiplier from either, and one multiplier in number of groups drawn anew; no candidate
comes twice. Everything follows from the seed and the results, so that a search that was interrupted, started again,
runs only what has not been run. The best of many noisy numbers is too high: measure it again, on the test file.

    run.dir/search.yaml          what the directory belongs to
    run.dir/candidate-000/ ...   run directories
    run.dir/candidates.json      the results so far
    run.dir/best.yaml            model.rates of the best so far
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import nn

from distrobust import config as configuration
from distrobust.config import Config
from distrobust.errors import ConfigError, DivergedError
from distrobust.evaluation.accuracy import wilson
from distrobust.metrics import Fanout, jsonl
from distrobust.train import launch, sources, transfer
from distrobust.train.modelfile import starting_model
from distrobust.train.rundir import RunDirectory, write_atomically

Genes = tuple[float, ...]  # a multiplier for each group

_MIN_GROUPS = 4
_MAX_TRIES = 200  # at a child that is not there yet, before a generation ends with fewer


@dataclass(frozen=True)
class Result:
    """A candidate after its run. robust, clean: accuracy in [0, 1] on the held-out rows; low, high: of the fitness, at
    95 %. frozen: share of the model's numbers. diverged: its run ended early, and its fitness is 0."""

    number: int
    generation: int
    genes: Genes
    fitness: float
    low: float
    high: float
    clean: float
    samples: int
    frozen: float
    diverged: bool


def search(
    config: Config, num_generations: int, population: int, choices: Sequence[float]
) -> Iterator[tuple[dict[str, str], list[Result]]]:
    """After every candidate: (pattern of each group by its name, the results so far).

    Raises ConfigError without a pre-trained model to start from, for impossible choices, and for a run directory of
    another search.
    """
    _check(config, population, choices)
    config = _for_candidates(config)
    source = sources.describe_training(config.data)
    net = starting_model(config.model, source, config.run.seed).net
    groups = layer_groups(net)
    directory = RunDirectory(config.run.dir)
    with directory.held():
        _bind(config, groups, population, choices)
        results: list[Result] = []
        for generation in range(num_generations):
            for genes in children(results, generation, population, choices, len(groups), config.run.seed):
                rates = dict(zip(groups.values(), genes, strict=True))
                frozen = _frozen_share(net, rates)
                result = _run(config, len(results), generation, genes, rates, frozen)
                results.append(result)
                _write(config.run.dir, groups, results)
                yield groups, results


def command(config: Config, num_generations: int, population: int, choices: Sequence[float]) -> Iterator[str]:
    """The lines of `distrobust search`: one a candidate, then all of them, best first."""
    lines: list[str] = []
    for groups, results in search(config, num_generations, population, choices):
        last = results[-1]
        yield f"candidate {last.number}, generation {last.generation}: fitness {100 * last.fitness:.1f} %"
        lines = table(list(groups), results)
    yield from lines
    yield f"model.rates of the best: {config.run.dir / 'best.yaml'}"
    yield f"its fitness is the highest of {len(lines) - 1}, so too high: train it and take the test numbers"


def children(
    results: Sequence[Result], generation: int, population: int, choices: Sequence[float], num_groups: int, seed: int
) -> Iterator[Genes]:
    """The candidates of a generation, at most `population`, none of them in `results` and none that freezes all."""
    rng = np.random.default_rng([seed, generation])
    known = {result.genes for result in results}
    parents = [result.genes for result in ranked(results)[: max(2, (len(results) + 1) // 2)]]
    made = 0
    for _ in range(_MAX_TRIES * population):
        if made == population:
            return
        if not known:
            genes: Genes = (1.0,) * num_groups
        elif generation == 0:
            genes = tuple(float(rng.choice(choices)) for _ in range(num_groups))
        else:
            mother, father = (parents[int(rng.integers(len(parents)))] for _ in range(2))
            crossed = [mine if rng.random() < 0.5 else other for mine, other in zip(mother, father, strict=True)]
            genes = tuple(float(rng.choice(choices)) if rng.random() < 1 / num_groups else gene for gene in crossed)
        if genes in known or not any(genes):
            continue
        known.add(genes)
        made += 1
        yield genes


def ranked(results: Sequence[Result]) -> list[Result]:
    """Best first; of equals the one that is better on clean images, then the earlier one."""
    return sorted(results, key=lambda result: (-result.fitness, -result.clean, result.number))


def layer_groups(model: nn.Module) -> dict[str, str]:
    """name -> pattern of the model's top-level modules that have parameters, in its order.

    Where those are fewer than four the largest is replaced by its parts, until there are.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    names = _parts("", list(sizes))
    while len(names) < _MIN_GROUPS:
        within = {name: [other for other in sizes if other == name or other.startswith(f"{name}.")] for name in names}
        divisible = [name for name in names if within[name] != [name]]
        if not divisible:
            break
        largest = max(divisible, key=lambda name: sum(sizes[other] for other in within[name]))
        place = names.index(largest)
        names[place : place + 1] = _parts(f"{largest}.", within[largest])
    return {name: name if name in sizes else f"{name}.*" for name in names}


def table(groups: Sequence[str], results: Sequence[Result]) -> list[str]:
    """Lines of text, best first."""
    lines = [f"{'#':>4} {'gen':>3} {'fitness':>8} {'95 % interval':>14} {'clean':>6} {'frozen':>7}  {' '.join(groups)}"]
    for one in ranked(results):
        between = f"{100 * one.low:.1f} .. {100 * one.high:.1f}"
        genes = " ".join(f"{gene:>{len(name)}g}" for gene, name in zip(one.genes, groups, strict=True))
        lines.append(
            f"{one.number:>4} {one.generation:>3} {100 * one.fitness:>6.1f} % {between:>14} {100 * one.clean:>6.1f} "
            f"{100 * one.frozen:>6.1f}%  {genes}{'  diverged' if one.diverged else ''}"
        )
    return lines


def _parts(prefix: str, names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(prefix + name.removeprefix(prefix).split(".")[0] for name in names))


def _check(config: Config, population: int, choices: Sequence[float]) -> None:
    model = config.model
    if config.pretrain is not None or (model.weights is None and model.directory is None):
        raise ConfigError(
            "search: wanted a pre-trained model, which all candidates start from: set pretrain to null and "
            "model.weights to models/pre-trained.pt of a run"
        )
    if model.rates:
        raise ConfigError(f"search: model.rates is what is searched for, got {model.rates}; leave it out")
    if len(set(choices)) < 2 or any(not 0.0 <= choice < float("inf") for choice in choices) or not any(choices):
        raise ConfigError(f"search --choices: got {list(choices)}, wanted two or more multipliers, one above 0")
    if population < 2:
        raise ConfigError(f"search --population: got {population}, wanted at least 2, to have parents")


def _for_candidates(config: Config) -> Config:
    """One rank here, without exporter and without the test file at the end."""
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"launcher": "local", "workers": 1, "min_workers": None}),
            "metrics": config.metrics.model_copy(update={"port": None}),
            "evaluate": config.evaluate.model_copy(update={"test": False}),
        }
    )


def _bind(config: Config, groups: dict[str, str], population: int, choices: Sequence[float]) -> None:
    """Refuses a directory of another search; more generations of the same one continue it."""
    path = config.run.dir / "search.yaml"
    mine = json.loads(
        json.dumps(
            {
                "population": population,
                "choices": list(choices),
                "groups": list(groups),
                "held_out_images": config.evaluate.held_out_images,
                "configuration": config.identity(),
            }
        )
    )
    if path.exists():
        difference = configuration.first_difference(mine, yaml.safe_load(path.read_text()))
        if difference:
            raise ConfigError(
                f"run.dir {config.run.dir} belongs to another search ({difference}); set run.dir to a new directory, "
                "or undo the change to continue this search"
            )
    write_atomically(path, yaml.safe_dump(mine, sort_keys=False))


def _run(config: Config, number: int, generation: int, genes: Genes, rates: dict[str, float], frozen: float) -> Result:
    """Runs a candidate, or continues it, or only reads what it left; KeyboardInterrupt if it was asked to stop."""
    directory = RunDirectory(config.run.dir / f"candidate-{number:03d}")
    mine = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": directory.path}),
            "model": config.model.model_copy(update={"rates": rates}),
        }
    )
    outcome = directory.outcome()
    diverged = outcome is not None and outcome.error == DivergedError.__name__
    if outcome is None or not (diverged or outcome.status == "done"):
        directory.open(mine)
        outcome = launch.run_here(mine, Fanout())
        diverged = outcome.error == DivergedError.__name__
        if not diverged:
            outcome.raise_if_failed()
        if outcome.status == "stopped":
            raise KeyboardInterrupt  # the job made of it a checkpoint, from which the next start continues
        shutil.rmtree(directory.checkpoints, ignore_errors=True)  # a search holds many
    if diverged:
        return Result(number, generation, genes, 0.0, 0.0, 1.0, 0.0, 0, frozen, diverged)
    last = _last_epoch(directory)
    clean, robust, samples = last["clean_accuracy"], last["robust_accuracy"], int(last["samples"])
    fitness = clean if robust is None else robust
    low, high = wilson(round(fitness * samples), samples)
    return Result(number, generation, genes, fitness, low, high, clean, samples, frozen, diverged)


def _last_epoch(directory: RunDirectory) -> dict[str, Any]:
    records = [record for record in jsonl.read(directory.metrics) if record["event"] == "epoch"]
    return records[-1]


def _frozen_share(net: nn.Module, rates: dict[str, float]) -> float:
    found = transfer.multipliers(net, rates)
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    return sum(size for name, size in sizes.items() if not found[name]) / sum(sizes.values())


def _write(directory: Path, groups: dict[str, str], results: Sequence[Result]) -> None:
    records = {"groups": groups, "candidates": [asdict(result) for result in results]}
    write_atomically(directory / "candidates.json", json.dumps(records, indent=1))
    best = ranked(results)[0]
    rates = dict(zip(groups.values(), best.genes, strict=True))
    head = f"# candidate {best.number}, fitness {best.fitness:.4f} on {best.samples} held-out images\n"
    write_atomically(directory / "best.yaml", head + yaml.safe_dump({"model": {"rates": rates}}, sort_keys=False))
