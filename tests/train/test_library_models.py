"""The whole job on models of other libraries."""

import shutil
from pathlib import Path

import pytest
import torch

from distrobust.errors import ConfigError, ModelError
from distrobust.train.modelfile import read_model_file
from tests.harness.huggingface import write_resnet, write_vit
from tests.harness.jobs import assert_equal, evaluated, records_of, run_job, weights_of
from tests.train.conftest import MakeConfig

SHORT = ("pretrain=null", "train.epochs=1", "noise=null", "evaluate.steps=2")


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_run_trains_says_what_it_changed_and_its_file_needs_no_directory(
    make_config: MakeConfig, stripes: Path, tmp_path: Path, kind: str
) -> None:
    directory = (write_resnet if kind == "resnet" else write_vit)(tmp_path / "model", 7)
    config = make_config("model.name=huggingface", f"model.directory={directory}", *SHORT)
    run_job(config)
    notices = [record["text"] for record in records_of(config, "notice")]
    assert sum("huggingface: the head is new" in text for text in notices) == 1
    assert sum("repeated into 3 channels" in text for text in notices) == 1
    assert {record["model"] for record in records_of(config, "evaluation")} == {"pre-trained", "fine-tuned"}
    before = read_model_file(config.run.dir / "models/pre-trained.pt")["state"]
    moved = [name for name, value in weights_of(config).items() if not torch.equal(value, before[name])]
    assert len(moved) > len(before) / 2

    shutil.rmtree(directory)
    path = config.run.dir / "models/fine-tuned.pt"
    scores = evaluated(path, stripes, tmp_path / "evaluation", steps=2)
    last = [record for record in records_of(config, "evaluation") if record["model"] == "fine-tuned"]
    assert [score["accuracy"] for score in scores] == [record["accuracy"] for record in last]

    tuned = make_config("model.name=huggingface", f"model.weights={path}", f"run.dir={tmp_path / 'further'}", *SHORT)
    run_job(tuned)  # from the file alone
    assert weights_of(tuned).keys() == weights_of(config).keys()
    assert not any("head is new" in record["text"] for record in records_of(tuned, "notice"))


def test_the_same_seed_gives_the_same_bits(make_config: MakeConfig, tmp_path: Path) -> None:
    directory = write_vit(tmp_path / "model", 7)
    configs = [
        make_config(
            "model.name=huggingface",
            f"model.directory={directory}",
            f"run.dir={tmp_path / str(number)}",
            "evaluate.images=4",
            *SHORT[:-1],
        )
        for number in range(2)
    ]
    for config in configs:
        run_job(config)
    assert_equal(weights_of(configs[0]), weights_of(configs[1]))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.name=huggingface"], "name huggingface needs a directory"),
        (["model.directory=x"], r"directory goes with name huggingface or timm:NAME, got name cnn"),
        (["model.image_size=32"], "image_size goes with name huggingface"),
    ],
)
def test_a_name_and_a_directory_that_do_not_go_together_are_refused(
    make_config: MakeConfig, overrides: list[str], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        make_config(*overrides)


def test_weights_of_a_reference_network_are_no_description(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"model": "cnn", "classes": ["a"], "shape": [1, 8, 8], "state": {}}, path)
    with pytest.raises(ModelError, match=r"weights of 'cnn', got model\.name 'huggingface'"):
        run_job(make_config("model.name=huggingface", f"model.weights={path}", "pretrain=null"))
