"""The search over rates per layer: what it proposes, and that an interrupted one runs nothing twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from distrobust import config as configuration
from distrobust import data
from distrobust.config import Config
from distrobust.errors import ConfigError
from distrobust.models import build
from distrobust.train import launch, loop, transfer_search
from distrobust.train.modelfile import build_model, save_model_file
from distrobust.train.rundir import RunDirectory
from distrobust.train.state import TrainState
from distrobust.train.step import StepResult, train_step
from distrobust.train.transfer_search import Result, children, command, layer_groups, ranked, search, table
from tests.harness.jobs import Crash, records_of
from tests.train.conftest import MakeConfig

CHOICES = (0.0, 0.1, 1.0)


def result(number: int, genes: tuple[float, ...], fitness: float, clean: float = 0.5) -> Result:
    return Result(number, 0, genes, fitness, 0.0, 1.0, clean, 100, 0.0, False)


def test_the_first_candidate_trains_everything_and_none_comes_twice_or_freezes_all() -> None:
    first = list(children([], 0, 8, CHOICES, 3, seed=0))
    assert first[0] == (1.0, 1.0, 1.0)
    known = [result(i, genes, i / 10) for i, genes in enumerate(first)]
    second = list(children(known, 1, 8, CHOICES, 3, seed=0))
    assert len({*first, *second}) == len(first) + len(second) == 16
    assert all(any(genes) and set(genes) <= set(CHOICES) for genes in [*first, *second])


def test_a_space_that_is_exhausted_ends_the_generation() -> None:
    assert sorted(children([], 0, 50, (0.0, 1.0), 2, seed=0)) == [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0)]


def test_the_seed_decides_all() -> None:
    known = [result(i, genes, i / 10) for i, genes in enumerate(children([], 0, 6, CHOICES, 6, seed=0))]
    twice = [list(children(known, 1, 6, CHOICES, 6, seed=seed)) for seed in (0, 0, 1)]
    assert twice[0] == twice[1] != twice[2]


def test_children_take_after_the_better_half() -> None:
    """A gene that only the worse half has can come by mutation alone: of 8 groups, one in 8 x 3 choices."""
    good = [result(i, (1.0,) * 7 + (float(i % 2),), 0.9) for i in range(2)]
    bad = [result(2 + i, (0.1,) * 7 + (float(i % 2),), 0.1) for i in range(2)]
    offspring = [genes for seed in range(20) for genes in children([*good, *bad], 1, 5, CHOICES, 8, seed)]
    inherited = sum(gene == 0.1 for genes in offspring for gene in genes[:7]) / (7 * len(offspring))
    # no child repeats a parent, so mutations are more frequent than the 1/24 of a single draw
    assert inherited < 0.15


def test_equal_fitness_is_decided_by_clean_accuracy_and_then_by_age() -> None:
    results = [result(0, (1.0,), 0.5, 0.6), result(1, (0.1,), 0.5, 0.7), result(2, (0.2,), 0.5, 0.7)]
    assert [one.number for one in ranked(results)] == [1, 2, 0]


def test_groups_are_top_level_modules_or_the_parts_of_the_largest() -> None:
    assert layer_groups(build("resnet9", 4, (1, 8, 8), [0.5], [0.25])) == {
        name: f"{name}.*" for name in ("prep", "layer1", "layer2", "layer3", "head")
    }
    inner = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16)))
    inner.token = nn.Parameter(inner[0].weight.new_zeros(3))
    network = nn.ModuleDict({"network": nn.ModuleDict({"body": inner, "head": nn.Linear(16, 2)})})
    assert list(layer_groups(network).values()) == [
        *("network.body.token", "network.body.0.*", "network.body.1.*", "network.head.*")
    ]
    assert len(layer_groups(nn.Linear(2, 2))) == 2


@pytest.fixture
def make_search(make_config: MakeConfig, stripes: Path, tmp_path: Path) -> MakeConfig:
    """make_search("a.b=c", ...): a search from one file of weights, which nobody trained."""
    weights = tmp_path / "before.pt"
    source = data.describe(stripes, "train")
    save_model_file(weights, build_model("cnn", source, 0), "cnn", source)

    def make(*overrides: str) -> Config:
        return make_config(
            "pretrain=null",
            f"model.weights={weights}",
            "train.epochs=1",
            "noise=null",
            "train.batch_size=64",
            *overrides,
        )

    return make


def test_a_search_runs_candidates_and_leaves_the_best_rates(make_search: MakeConfig) -> None:
    config = make_search()
    printed = list(command(config, 2, 2, (0.0, 1.0)))
    *_, (groups, results) = search(config, 2, 2, (0.0, 1.0))  # reads what is there
    assert len(results) == 4
    assert [one.generation for one in results] == [0, 0, 1, 1]
    for one in results:
        run = config.model_copy(update={"run": config.run.model_copy(update={"dir": _candidate(config, one.number)})})
        last = records_of(run, "epoch")[-1]
        assert one.fitness == last["robust_accuracy"]
        assert one.clean == last["clean_accuracy"]
        assert one.low <= one.fitness <= one.high
        assert records_of(run, "evaluation") == []  # the test file was never looked at
    best = yaml.safe_load((config.run.dir / "best.yaml").read_text())["model"]["rates"]
    assert tuple(best.values()) == ranked(results)[0].genes
    assert list(best) == ["stem.*", "layer1.*", "layer2.*", "head.*"]
    lines = table(list(groups), results)
    assert len(lines) == 5
    assert printed[4:9] == lines
    assert str(config.run.dir / "best.yaml") in printed[9]
    assert lines[1].split()[0] == str(ranked(results)[0].number)
    assert len(json.loads((config.run.dir / "candidates.json").read_text())["candidates"]) == 4


def _candidate(config: Config, number: int) -> Path:
    return config.run.dir / f"candidate-{number:03d}"


def test_an_interrupted_search_runs_no_finished_candidate_again_and_ends_the_same(
    make_search: MakeConfig, tmp_path: Path, crash_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_search(f"run.dir={tmp_path / 'whole'}")
    *_, (_, expected) = search(whole, 2, 2, (0.0, 1.0))
    config = make_search()
    steps: list[Path] = []
    crashes = [5]  # steps until the crash: in the third candidate, of two steps each

    def counting(state: TrainState, *rest: Any) -> StepResult:
        crashes[0] -= 1
        if crashes[0] < 0:
            raise Crash
        steps.append(Path())
        return train_step(state, *rest)

    monkeypatch.setattr(loop, "train_step", counting)
    with pytest.raises(Crash):
        list(search(config, 2, 2, (0.0, 1.0)))
    assert len(steps) == 5
    crashes[0] = 100
    *_, (_, results) = search(config, 2, 2, (0.0, 1.0))
    assert results == expected
    assert len(steps) == 8 + 1  # one of the third candidate's came after its last checkpoint
    *_, (_, again) = search(config, 2, 2, (0.0, 1.0))
    assert again == expected
    assert len(steps) == 9


def test_a_stopped_candidate_stops_the_search(make_search: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_search()

    def stopping(state: TrainState, *rest: Any) -> StepResult:
        RunDirectory(_candidate(config, 0)).stop.touch()
        return train_step(state, *rest)

    monkeypatch.setattr(loop, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        list(search(make_search("metrics.every=1"), 1, 2, (0.0, 1.0)))


def test_a_candidate_that_diverges_has_no_fitness_and_the_search_goes_on(
    make_search: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = launch.run_here

    def poisoned(config: Config, sink: Any) -> Any:
        if config.model.rates["head.*"] == 1.0:
            config = config.model_copy(
                update={"train": config.train.model_copy(update={"max_skipped_steps": 1, "weight_decay": 1e38})}
            )
        return here(config, sink)

    monkeypatch.setattr(transfer_search.launch, "run_here", poisoned)
    *_, (_, results) = search(make_search("compress=null"), 1, 3, (0.0, 1.0))
    assert len(results) == 3
    assert results[0].diverged
    assert all(one.diverged == (one.genes[-1] == 1.0) for one in results)
    assert results[0].fitness == 0.0


@pytest.mark.parametrize(
    ("overrides", "population", "choices", "text"),
    [
        (["model.weights=null"], 2, CHOICES, "wanted a pre-trained model"),
        (["model.weights=null", "pretrain={}"], 2, CHOICES, "wanted a pre-trained model"),
        (["model.rates={'head.*': 1}"], 2, CHOICES, r"model\.rates is what is searched for"),
        ([], 2, (0.0,), "--choices: got .* wanted two or more"),
        ([], 2, (-1.0, 1.0), "--choices"),
        ([], 1, CHOICES, "--population: got 1"),
    ],
)
def test_impossible_searches_are_one_line(
    make_config: MakeConfig, overrides: list[str], population: int, choices: tuple[float, ...], text: str
) -> None:
    config = make_config("pretrain=null", "model.weights=x.pt", *overrides)
    with pytest.raises(ConfigError, match=text):
        list(search(config, 1, population, choices))


def test_a_directory_of_another_search_is_refused_and_more_generations_continue(make_search: MakeConfig) -> None:
    list(search(make_search(), 1, 2, (0.0, 1.0)))
    with pytest.raises(ConfigError, match=r"belongs to another search \(configuration\.train\.momentum"):
        list(search(make_search("train.momentum=0.5"), 1, 2, (0.0, 1.0)))
    with pytest.raises(ConfigError, match=r"belongs to another search \(choices"):
        list(search(make_search(), 1, 2, (0.5, 1.0)))
    *_, (_, results) = search(make_search(), 2, 2, (0.0, 1.0))
    assert len(results) == 4


def test_candidates_of_an_elastic_run_have_one_worker(make_search: MakeConfig) -> None:
    config = make_search("cluster={workers: 4, min_workers: 2, launcher: ray}", "train.batch_size=48")
    values = transfer_search._for_candidates(config).model_dump(mode="json")
    cluster = configuration.parse(values, "as continued").cluster
    assert (cluster.workers, cluster.min_workers, cluster.launcher) == (1, None, "local")
