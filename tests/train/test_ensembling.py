"""The sweep over mixtures of two model files: what it measures where, and what it writes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distrobust import cli, data
from distrobust.adversarial.threat import Threat
from distrobust.config import Config
from distrobust.errors import ConfigError, ModelError
from distrobust.evaluation.ensemble import interpolate
from distrobust.train import ensembling
from distrobust.train.ensembling import Settings, sweep
from distrobust.train.modelfile import build_model, read_model_file, save_model_file
from tests.harness.jobs import assert_equal, evaluated, run_job
from tests.train.conftest import MakeConfig, with_other_labels, write_stripes

THREATS = (Threat("linf", 0.05), Threat("linf", 0.1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that held out 30 % of 160 rows by seed 3."""
    stripes = write_stripes(tmp_path_factory.mktemp("stripes"))
    config = Config.model_validate(
        {
            "run": {"dir": str(tmp_path_factory.mktemp("run")), "seed": 3},
            "cluster": {"launcher": "local", "workers": 1},
            "data": {"path": str(stripes), "held_out": 0.3},
            "model": {"name": "cnn"},
            "pretrain": {"epochs": 2, "batch_size": 32},
            "train": {"epochs": 2, "batch_size": 32},
            "attack": {"name": "fgsm", "eps": 0.05},
            "compress": None,
            "evaluate": {"steps": 1},
            "metrics": {"port": None},
        }
    )
    run_job(config)
    return config


@pytest.fixture
def settings(run: Config, tmp_path: Path) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        models = run.run.dir / "models"
        files = {"pretrained": models / "pre-trained.pt", "finetuned": models / "fine-tuned.pt"}
        fixed = {"data": run.data.path, "threats": THREATS[:1], "num_alphas": 3, "steps": 2, "out": tmp_path / "out"}
        return Settings(**{**files, **fixed, **changes})

    return make


def record_of(settings: Settings) -> Any:
    lines = list(sweep(settings))
    assert settings.out is not None
    return {**json.loads((settings.out / "ensemble.json").read_text()), "lines": lines}


def test_mixtures_are_measured_on_the_rows_the_run_held_out_and_the_test_file_comes_last(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, bool]] = []  # total rows of the shard, and whether it is the test file

    def watching(shard: data.Shard, limit: int, batch: int) -> Any:
        read.append((shard.total_rows, "test" in shard.source.files[0].name))
        return spaced(shard, limit, batch)

    spaced = ensembling.spaced_rows
    monkeypatch.setattr(ensembling, "spaced_rows", watching)
    record = record_of(settings())
    assert record["held_out"] == {"share": 0.3, "seed": 3, "rows": 48}
    assert record["warning"] == ""
    num_tested = len(record["test"])
    assert read == [(48, False)] * 6 + [(40, True)] * 2 * num_tested
    assert [point["a"] for point in record["points"]] == [0.0, 0.5, 1.0]
    for point in [*record["points"], *record["test"]]:
        clean, robust = point["scores"]
        assert clean["attack"] == "clean"
        assert robust["attack"] == "PGD-2 Linf 0.05"
        assert robust["accuracy"] <= clean["accuracy"]
        assert all(s["low"] <= s["accuracy"] <= s["high"] for s in point["scores"])


def test_both_splits_are_read_by_the_columns_the_model_learned_from(
    settings: Callable[..., Settings], run: Config, tmp_path: Path
) -> None:
    chosen = settings(data=with_other_labels(run.data.path, tmp_path / "data"))
    before, after = read_model_file(chosen.pretrained), read_model_file(chosen.finetuned)
    assert (after["column"], after["label_column"]) == ("image", "label")
    mixer = ensembling._Mixer.of(chosen, before, {**after, "label_column": "coarse"})
    assert mixer.train.source.label_column == mixer.test.source.label_column == "coarse"
    for name in ("column", "label_column"):  # as of 0.1.0
        del after[name]
    assert ensembling._Mixer.of(chosen, before, after).test.source.label_column == "label"


def test_the_ends_score_as_the_files_themselves(settings: Callable[..., Settings], run: Config, tmp_path: Path) -> None:
    record = record_of(settings())
    by_share = {point["a"]: point for point in record["test"]}
    for a, name in ((0.0, "pre-trained"), (1.0, "fine-tuned")):
        path = run.run.dir / f"models/{name}.pt"
        scores = evaluated(path, run.data.path, tmp_path / name, steps=2, seed=3)
        assert [s["correct"] for s in by_share[a]["scores"]] == [score["correct"] for score in scores]


def test_the_best_on_held_out_rows_is_chosen_whatever_the_test_file_says(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are put in: clean, first and second budget of each a on held-out rows; the reverse on the test file."""
    told = {0.0: (90, 0, 0), 0.5: (70, 60, 0), 1.0: (60, 65, 90)}

    def measured(mixer: Any, a: float, rows: data.Shard) -> ensembling.Point:
        values = told[a] if rows is mixer.held_out else told[1.0 - a]
        scores = [ensembling.score(counts(value), None, None, 0) for value in values]
        return ensembling.Point(a, tuple(scores))

    def counts(correct: int) -> Any:
        return ensembling.count_correct.__globals__["Counts"]((correct,), (100,))

    monkeypatch.setattr(ensembling._Mixer, "measure", measured)
    record = record_of(settings(threats=THREATS))
    assert record["chosen"] == 0.5  # 65 against 45 and 62.5; the second budget has no say
    assert [point["a"] for point in record["test"]] == [0.0, 0.5, 1.0]


def test_of_equals_the_more_robust_end_is_chosen(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = ensembling.score(ensembling.count_correct.__globals__["Counts"]((1,), (2,)), None, None, 0)
    monkeypatch.setattr(ensembling._Mixer, "measure", lambda _m, a, _r: ensembling.Point(a, (score, score)))
    assert record_of(settings())["chosen"] == 1.0


@pytest.mark.parametrize(("write", "a"), [(0.25, 0.25), ("best", None)])
def test_a_mixture_is_written_as_an_ordinary_model_file(
    settings: Callable[..., Settings], run: Config, write: Any, a: float | None
) -> None:
    chosen = settings(write=write)
    record = record_of(chosen)
    share = record["chosen"] if a is None else a
    path = chosen.out / f"ensemble-{share:g}.pt"  # type: ignore[operator]
    before, after = (read_model_file(file)["state"] for file in (chosen.pretrained, chosen.finetuned))
    assert_equal(read_model_file(path)["state"], interpolate(before, after, share))
    assert evaluated(path, run.data.path, chosen.out / "evaluation", steps=1, images=8)  # type: ignore[operator]


@pytest.mark.parametrize("statistics", ["clean", "adversarial"])
def test_re_estimated_statistics_are_of_training_rows_and_change_no_parameter(
    settings: Callable[..., Settings], statistics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watching(net: Any, batches: Any, attack: Any, threat: Any, seed: int) -> int:
        given = list(batches)
        seen.append(sum(len(labels) for _, labels in given))
        assert (attack is None) == (threat is None) == (statistics == "clean")
        return reestimate(net, given, attack, threat, seed)

    reestimate = ensembling.reestimate_
    monkeypatch.setattr(ensembling, "reestimate_", watching)
    chosen = settings(statistics=statistics, write=0.5, num_alphas=2)
    record_of(chosen)
    assert set(seen) == {112}  # of 160 rows 48 are held out
    state = read_model_file(chosen.out / "ensemble-0.5.pt")["state"]  # type: ignore[operator]
    before, after = (read_model_file(file)["state"] for file in (chosen.pretrained, chosen.finetuned))
    plain = interpolate(before, after, 0.5)
    differing = {name.split(".")[-1] for name in plain if not torch.equal(state[name], plain[name])}
    assert differing <= {"running_mean", "running_var", "num_batches_tracked"}
    assert {"running_mean", "running_var"} <= differing


def test_rows_that_a_model_learned_from_are_said(
    settings: Callable[..., Settings], tmp_path: Path, run: Config
) -> None:
    assert "learned from some of them: its run held out 0.3, seed 3" in next(iter(sweep(settings(seed=4))))
    moved = tmp_path / "alone/models/fine-tuned.pt"
    moved.parent.mkdir(parents=True)
    moved.write_bytes((run.run.dir / "models/fine-tuned.pt").read_bytes())
    first = next(iter(sweep(settings(finetuned=moved, held_out=0.3, seed=3))))
    assert "the run of the fine-tuned model is not known" in first
    (tmp_path / "alone/config.yaml").write_text("clients: {}\n")  # of a simulation, or of another program
    first = next(iter(sweep(settings(finetuned=moved, held_out=0.3, seed=3))))
    assert "the run of the fine-tuned model is not known" in first
    (tmp_path / "alone/config.yaml").write_text(yaml.safe_dump({"data": {"path": "x", "held_out": 0.1}}))
    assert "16 held-out rows: 0.1 of the training file, by seed 0" in next(iter(sweep(settings(finetuned=moved))))


def test_files_of_two_models_are_refused(settings: Callable[..., Settings], tmp_path: Path, run: Config) -> None:
    source = data.describe(run.data.path, "test")
    other = tmp_path / "other.pt"
    save_model_file(other, build_model("resnet9", source, 0), "resnet9", source)
    with pytest.raises(ModelError, match=r"are not of one model: model differs \(resnet9 and cnn\)"):
        list(sweep(settings(pretrained=other)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_alphas": 1}, "--alphas: got 1"),
        ({"threats": ()}, "--eps: got none"),
        ({"write": 0.5, "out": None}, "--write: wanted --out"),
        ({"write": 1.5}, r"--write: got 1\.5"),
    ],
)
def test_impossible_settings_are_one_line(settings: Callable[..., Settings], changes: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        list(sweep(settings(**changes)))


def test_the_command_prints_and_draws(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models, out = run.run.dir / "models", tmp_path / "out"
    files = [str(models / "pre-trained.pt"), str(models / "fine-tuned.pt")]
    options = ["--data", str(run.data.path), "--alphas", "2", "--eps", "0.05", "--eps", "0.1", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["distrobust", "ensemble", *files, *options, "--images", "8", "--out", str(out)])
    cli.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("48 held-out rows")
    assert printed[1].split()[:2] == ["a", "clean"]
    assert printed[2].split()[0] == "0"
    assert printed[4].startswith("chosen: a = ")
    assert "few samples" in printed[7]
    assert [line for line in printed if line.startswith("written: ")] == [
        f"written: {out / 'ensemble.json'}",
        f"written: {out / 'ensemble.svg'}",
    ]
    drawing = (out / "ensemble.svg").read_text()
    assert drawing.count("PGD-1 Linf 0.05") >= 1
    assert len(json.loads((out / "ensemble.json").read_text())["points"][0]["scores"]) == 3


def test_a_mixture_of_a_library_model_can_be_made(make_config: MakeConfig, tmp_path: Path) -> None:
    from tests.harness.huggingface import write_vit

    directory = write_vit(tmp_path / "model", 4)
    short = ("pretrain=null", "train.epochs=1", "noise=null", "evaluate.test=false")
    config = make_config("model.name=huggingface", f"model.directory={directory}", *short)
    run_job(config)
    models = config.run.dir / "models"
    made = Settings(
        models / "pre-trained.pt",
        models / "fine-tuned.pt",
        config.data.path,
        THREATS[:1],
        num_alphas=2,
        steps=1,
        images=8,
        out=tmp_path / "out",
        write=0.5,
    )
    list(sweep(made))
    written = read_model_file(tmp_path / "out/ensemble-0.5.pt")
    assert written["model"] == read_model_file(made.finetuned)["model"]
