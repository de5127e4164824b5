"""The configuration says what is wrong, where, and what would be right."""

from pathlib import Path
from typing import Any

import pytest

from distrobust import config
from distrobust.errors import ConfigError

MINIMAL: dict[str, Any] = {"data": {"path": "somewhere"}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"compres": {}}, "unknown key 'compres'; did you mean 'compress'"),
        ({"compress": {"densty": 0.1}}, "unknown key 'compress.densty'; did you mean 'density'"),
        (
            {"pretrain": {"schedule": {"speed": 1}}},
            "unknown key 'pretrain.schedule.speed'; valid: name, peak, warmup, floor, tuned_for, scaling",
        ),
        ({"compress": {"density": 0}}, "compress.density: wanted greater than 0, got 0"),
        ({"compress": {"density": 1.5}}, "compress.density: wanted less than or equal to 1, got 1.5"),
        ({"compress": {"density": "auto"}}, "compress: density auto goes with one of fewer_bytes and exchange_s"),
        ({"compress": {"fewer_bytes": 100}}, "compress: density auto goes with .*got density 0.01, fewer_bytes 100"),
        (
            {"compress": {"values": "fp8"}},
            "compress.values: wanted 'fp32', 'fp16', 'bf16', 'int8', '4bit', '2bit' or 'sign', got 'fp8'",
        ),
        ({"attack": {"eps": 8}}, "eps 8 is above 1 for inputs in .* did you mean 8/255"),
        ({"attack": {"eps": 8}, "model": {"name": "cnn"}}, "attack.eps 8 is above 1"),
        ({"attack": {"eps": "8/0"}}, "attack.eps: .*got '8/0'"),
        ({"attack": {"eps": f"{10**400}/255"}}, "attack.eps: wanted a valid number"),
        ({"attack": {"eps": "1e400"}}, "attack.eps: wanted a finite number, got '1e400'"),
        ({"train": {"weight_decay": float("inf")}}, "train.weight_decay: wanted a finite number, got inf"),
        ({"train": {"momentum": float("nan")}}, "train.momentum: wanted a finite number, got nan"),
        ({"model": {"rates": {"a": float("nan")}}}, "model.rates.a: wanted a finite number, got nan"),
        (
            {"faults": [{"kind": "slow", "rank": 0, "step": 1, "stepp": 3}]},
            "unknown key 'faults.0.stepp'; did you mean 'step'",
        ),
        ({"faults": [{"kind": "slow", "rank": -1, "step": 1}]}, "faults.0.rank: wanted greater .* to 0, got -1"),
        ({"attack": {"eps": -0.1}}, "attack.eps: wanted greater than or equal to 0"),
        ({"train": {"epochs": 0}}, "train.epochs: wanted greater than or equal to 1, got 0"),
        (
            {"train": {"nesterov": True, "momentum": 0}},
            "train: nesterov needs .* a momentum above 0; got sgd, momentum 0",
        ),
        (
            {"train": {"nesterov": True, "optimizer": "adamw"}},
            "train: nesterov needs optimizer sgd .* got adamw, momentum 0.9",
        ),
        ({"train": {"optimizer": "adam"}}, "train.optimizer: wanted 'sgd', 'adamw' or 'lanton', got 'adam'"),
        (
            {"train": {"optimizer": "lanton"}, "compress": {"step_ahead": True}},
            "compress.step_ahead: got train.optimizer lanton, wanted sgd",
        ),
        ({"model": {"weights": "a.pt"}, "pretrain": {}}, "pretrain and model.weights exclude each other"),
        ({"cluster": {"workers": "two"}}, "cluster.workers: wanted a valid integer.*got 'two'"),
        (
            {"cluster": {"workers": 2, "min_workers": 1}, "compress": {"exchange": "hierarchical"}},
            "compress.exchange hierarchical: its residuals belong to the workers of a machine",
        ),
        ({"noise": {"alpha": 0}}, "noise.alpha: wanted greater than 0"),
        ({"checkpoint": {"keep": 1}}, "checkpoint.keep: wanted greater than or equal to 2"),
    ],
)
def test_an_impossible_value_is_one_clear_line(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config.parse({**MINIMAL, **section}, "job.yaml")
    assert str(caught.value).startswith("job.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_key_that_is_given_twice_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("data: {path: a}\ntrain:\n  epochs: 3\n  batch_size: 32\n  epochs: 4\n")
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert str(caught.value) == f"{file}, line 5: 'epochs' is given already in line 3; leave one out"
    file.write_text("data: &d {path: a}\nrun: &r\n  <<: {seed: 1, dir: x}\n  seed: 2\n")
    assert config.load(file, ["train={epochs: 2, batch_size: 8}"]).run.seed == 2  # a merge may be overridden
    with pytest.raises(ConfigError, match=r"--set train=.*, line 1: 'epochs' is given already in line 1"):
        config.load(file, ["train={epochs: 2, epochs: 8}"])


def test_a_missing_value_says_how_to_give_it() -> None:
    with pytest.raises(ConfigError, match=r"data is missing; give it in the file or with --set data="):
        config.parse({}, "job.yaml")


def test_fractions_of_255_are_budgets() -> None:
    parsed = config.parse({**MINIMAL, "attack": {"eps": "8/255", "step_size": "2/255"}}, "job.yaml")
    assert parsed.attack is not None
    assert (parsed.attack.eps, parsed.attack.step_size) == (8 / 255, 2 / 255)


def test_overrides_win_over_the_file_and_reach_new_sections(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("data: {path: a}\ncompress: {density: 0.1}\npretrain: null\n")
    loaded = config.load(path, ["compress.density=1e-3", "pretrain.epochs=2", "noise=null", "data.path=b"])
    assert loaded.compress is not None
    assert loaded.pretrain is not None
    assert (loaded.compress.density, loaded.pretrain.epochs, str(loaded.data.path)) == (0.001, 2, "b")


@pytest.mark.parametrize("override", ["compress.density", "=1", "compress..density=1", "data.path.x=1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("data: {path: a}\n")
    with pytest.raises(ConfigError, match="--set"):
        config.load(path, [override])


def test_the_dump_of_a_configuration_loads_as_the_same(tmp_path: Path) -> None:
    first = config.parse({**MINIMAL, "pretrain": {}, "noise": {}}, "job.yaml")
    path = tmp_path / "dump.yaml"
    path.write_text(config.dump(first))
    assert config.load(path) == first


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("- 1\n", "wanted sections"), (None, "cannot be read")]
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(path)


def test_a_file_cannot_execute_anything(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"data: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'owned'}]\n")
    with pytest.raises(ConfigError, match="not YAML"):
        config.load(path)
    assert not (tmp_path / "owned").exists()


def test_a_run_is_bound_to_what_changes_its_parameters_and_nothing_else() -> None:
    first = config.parse(MINIMAL, "a")
    moved = config.parse(
        {
            **MINIMAL,
            "run": {"dir": "x"},
            "metrics": {"port": 1},
            "cluster": {"launcher": "local", "workers": 3},
            "kubernetes": {"memory": "9Gi"},
        },
        "b",
    )
    assert first.identity() == moved.identity()
    for change in (
        {"run": {"seed": 1}},
        {"compress": {"clip": 1.0}},
        {"train": {"epochs": 9}},
    ):
        assert config.parse({**MINIMAL, **change}, "c").identity() != first.identity()


def test_an_embedding_of_texts_has_no_box() -> None:
    values = {**MINIMAL, "model": {"name": "transformer"}, "attack": {"eps": 1.5}, "evaluate": {"eps": 2}}
    assert config.parse(values, "job.yaml").attack.eps == 1.5  # type: ignore[union-attr]
