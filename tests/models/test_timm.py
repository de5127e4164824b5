"""Laws of timm's models; with a stand-in for timm, and with timm itself where it can be imported."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distrobust.errors import ConfigError, ModelError
from distrobust.models import FromDirectory, from_directory, load_weights, rebuild

SHAPE = (3, 8, 8)


class Tiny(nn.Module):
    def __init__(self, num_classes: int, size: int, fixed: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, num_classes)
        self.pretrained_cfg = {
            "mean": (0.1, 0.2, 0.3),
            "std": (0.5, 0.6, 0.7),
            "input_size": (3, size, size),
            "fixed_input_size": fixed,
            "classifier": "fc",
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.stem(x).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"tiny12_fixed": True, "tiny12": False}

    def create_model(name: str, *, pretrained: bool, num_classes: int) -> nn.Module:
        assert not pretrained  # that would download
        return Tiny(num_classes, 12, names[name])

    module: Any = ModuleType("timm")
    module.list_models, module.create_model = lambda: list(names), create_model
    monkeypatch.setitem(sys.modules, "timm", module)


def load(name: str, directory: Path | None = None, num_classes: int = 4, seed: int = 1) -> FromDirectory:
    return from_directory(f"timm:{name}", directory, num_classes, SHAPE, seed=seed)


@pytest.mark.usefixtures("stand_in")
def test_random_weights_follow_from_the_seed_and_the_description_rebuilds() -> None:
    made, again, other = load("tiny12_fixed"), load("tiny12_fixed"), load("tiny12_fixed", seed=2)
    x = torch.rand(2, *SHAPE)
    assert made.notices == ("images of 8 x 8 pixels are resized to 12 x 12 inside the model",)
    assert torch.equal(made.model(x), again.model(x))
    assert not torch.equal(made.model(x), other.model(x))
    rebuilt = rebuild(made.architecture, SHAPE)
    load_weights(rebuilt, made.model.state_dict(), "x")
    assert torch.equal(made.model(x), rebuilt(x))
    assert load("tiny12").notices == ()


@pytest.mark.usefixtures("stand_in")
def test_weights_come_from_a_directory_and_a_head_of_other_classes_is_new(tmp_path: Path) -> None:
    saved = Tiny(4, 12, True).state_dict()
    save_file(saved, tmp_path / "model.safetensors")
    same, other = load("tiny12", tmp_path), load("tiny12", tmp_path, num_classes=7)
    assert all(torch.equal(value, same.model.state_dict()[f"network.{name}"]) for name, value in saved.items())
    assert same.notices == ()
    assert torch.equal(other.model.get_parameter("network.stem.weight"), saved["stem.weight"])
    assert other.notices == ("the head is new (fc.weight, fc.bias): another number of classes there",)
    del saved["stem.bias"]
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 missing \(stem\.bias\)"):
        load("tiny12", tmp_path)
    with pytest.raises(ModelError, match=r"has no model\.safetensors; nothing is downloaded"):
        load("tiny12", tmp_path / "nowhere")


@pytest.mark.usefixtures("stand_in")
def test_a_name_timm_does_not_know_gives_the_closest() -> None:
    with pytest.raises(ModelError, match=r"timm:tiny21: timm has no model of that name; did you mean tiny12"):
        load("tiny21")


def test_without_timm_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="timm is not installed; pip install timm"):
        load("resnet18")


def test_a_model_of_timm_itself() -> None:
    pytest.importorskip("timm", reason="timm is not installed: it needs torchvision, which has no build here")
    made = load("test_resnet")
    x = torch.rand(2, *SHAPE, requires_grad=True)
    made.model(x).sum().backward()
    assert x.grad is not None
    rebuilt = rebuild(made.architecture, SHAPE)
    load_weights(rebuilt, made.model.state_dict(), "x")
    assert torch.equal(made.model.eval()(x), rebuilt.eval()(x))
