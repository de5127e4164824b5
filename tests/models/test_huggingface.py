"""Laws of Hugging Face classifiers from a directory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distrobust.errors import ModelError
from distrobust.models import Adapted, FromDirectory, from_directory, load_weights, rebuild
from tests.harness.huggingface import write_resnet, write_vit

MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
SHAPE = (3, 16, 16)


def load(directory: Path, num_classes: int = 4, shape: tuple[int, int, int] = SHAPE, **options: Any) -> FromDirectory:
    return from_directory("huggingface", directory, num_classes, shape, **{"seed": 1, **options})


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_resnet(tmp_path_factory.mktemp("resnet"), 4, image_mean=MEAN, image_std=STD)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vit(tmp_path_factory.mktemp("vit"), 4, image_mean=MEAN, image_std=STD)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_logits_are_those_of_the_library_on_normalised_images(kind: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForImageClassification

    directory = request.getfixturevalue(kind)
    made = load(directory)
    theirs = AutoModelForImageClassification.from_pretrained(directory, local_files_only=True).eval()
    x = torch.rand(3, *SHAPE)
    by_hand = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert torch.equal(made.model.eval()(x), theirs(by_hand).logits)
    assert made.notices == ()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_every_pixel_has_a_gradient(kind: str, request: pytest.FixtureRequest) -> None:
    x = torch.rand(2, 3, 24, 20, requires_grad=True)
    model = load(request.getfixturevalue(kind), shape=(3, 24, 20), image_size=16).model
    model(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).float().mean() > 0.9


def test_another_number_of_classes_gets_a_new_head_from_the_seed_and_keeps_the_rest(vit: Path) -> None:
    old, new, again, other = (load(vit, n, seed=seed) for n, seed in ((4, 1), (7, 1), (7, 1), (7, 2)))
    assert new.notices == ("the head is new (classifier.weight, classifier.bias): 4 classes there, 7 here",)
    for name, value in new.model.state_dict().items():
        if "classifier" not in name:
            assert torch.equal(value, old.model.state_dict()[name]), name
    head = [one.model.get_parameter("network.classifier.weight") for one in (new, again, other)]
    assert head[0].shape == (7, 16)
    assert torch.equal(head[0], head[1])
    assert not torch.equal(head[0], head[2])


def test_the_global_generator_is_left_alone(vit: Path) -> None:
    before = torch.get_rng_state()
    load(vit, 7)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_without_a_head_get_one(tmp_path: Path) -> None:
    made = load(write_vit(tmp_path, 4, headless=True, image_mean=MEAN, image_std=STD))
    assert made.notices[0] == "the head is new (classifier.weight, classifier.bias): there is none in the file"
    assert made.notices[1].startswith("2 weights of the file have no place in the model (pooler")


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_description_rebuilds_the_model_without_its_directory(kind: str, request: pytest.FixtureRequest) -> None:
    made = load(request.getfixturevalue(kind), 7, (1, 9, 9))
    described = json.loads(json.dumps(made.architecture))  # plain data
    assert str(request.getfixturevalue(kind)) not in json.dumps(described)
    again = rebuild(described, (1, 9, 9))
    load_weights(again, made.model.state_dict(), "x")
    x = torch.rand(2, 1, 9, 9)
    assert torch.equal(made.model.eval()(x), again.eval()(x))


def test_other_sizes_and_gray_images_fit_and_both_are_said(vit: Path) -> None:
    made = load(vit, shape=(1, 8, 8))
    assert made.notices == (
        "gray images are repeated into 3 channels inside the model",
        "images of 8 x 8 pixels are resized to 16 x 16 inside the model",
    )
    x = torch.rand(2, 1, 8, 8)
    by_hand = torch.nn.functional.interpolate(x.expand(-1, 3, -1, -1), (16, 16), mode="bilinear", align_corners=False)
    assert torch.equal(made.model.eval()(x), load(vit).model.eval()(by_hand))


def test_large_images_are_smoothed_where_they_shrink() -> None:
    """A checkerboard of single pixels is gray at a third of its size, where every third pixel alone is black or white.

    The kernel is (1, 2, 3, 2, 1) / 9 in either direction, which leaves 1/81 of the contrast inside, more at the rim.
    """
    board = (torch.arange(24).view(-1, 1) + torch.arange(24)).remainder(2).float().expand(1, 1, 24, 24)
    seen = Adapted(torch.nn.Identity(), [0.0], [1.0], (8, 8))(board)
    torch.testing.assert_close(seen, torch.full((1, 1, 8, 8), 0.5), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("preprocessor", "lowest", "highest"),
    [
        ({"do_normalize": False}, 0.0, 1.0),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, -1.0, 1.0),
        ({"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5, "rescale_offset": True}, -1, 1),
        ({"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "do_rescale": False}, 0.0, 255.0),
        ({}, -2.0, 2.0),  # none: said in a notice
    ],
)
def test_the_network_sees_the_range_its_preprocessor_made(
    tmp_path: Path, preprocessor: dict[str, Any], lowest: float, highest: float
) -> None:
    made = load(write_resnet(tmp_path, 4, **preprocessor))
    seen = made.model.get_submodule("normalise")(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    torch.testing.assert_close(seen.flatten(1)[:, 0], torch.tensor([float(lowest), float(highest)]))
    assert [text.split(" in ")[0] for text in made.notices] == ([] if preprocessor else ["no preprocessor_config.json"])


def test_images_of_another_size_than_trained_on_stay_and_it_is_said(tmp_path: Path) -> None:
    write_resnet(tmp_path, 4, do_normalize=False, size={"shortest_edge": 24})
    assert load(tmp_path).notices == (
        "trained on 24 x 24 pixels, gets them as they are; model.image_size=24 resizes them",
    )
    assert load(tmp_path, image_size=24).notices == (
        "images of 16 x 16 pixels are resized to 24 x 24 inside the model",
    )
    assert load(tmp_path, shape=(3, 24, 24)).notices == ()


def test_a_parameter_no_logit_depends_on_is_frozen_and_said(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ViTForImageClassification

    theirs = ViTForImageClassification.__init__

    def with_a_token(self: Any, config: Any) -> None:
        theirs(self, config)
        self.spare = torch.nn.Parameter(torch.zeros(3))

    monkeypatch.setattr(ViTForImageClassification, "__init__", with_a_token)
    directory = write_vit(vit.parent / "spare", 4, image_mean=MEAN, image_std=STD)
    made = load(directory)
    assert made.notices == ("1 parameters are never used and stay as they are (network.spare)",)
    assert [name for name, p in made.model.named_parameters() if not p.requires_grad] == ["network.spare"]
    assert made.model.training


def _without_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _of_another_width(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    state["resnet.embedder.embedder.convolution.weight"] = torch.zeros(9, 3, 7, 7)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _of_another_architecture(directory: Path) -> None:
    vit = write_vit(directory / "vit", 4)
    (vit / "model.safetensors").replace(directory / "model.safetensors")


def _of_text(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "distilbert"}')


def _unknown(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "nonesuch"}')


def _truncated(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_without_weights, r"has no model\.safetensors; pytorch_model\.bin is a pickle, which is not opened"),
        (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json: cannot be read as JSON"),
        (_of_another_width, r"1 of another shape \(resnet\.embedder\.embedder\.convolution\.weight\)"),
        (
            _of_another_architecture,
            r"not those of the model in its config\.json: .* missing .* unexpected .*same model",
        ),
        (_of_text, "can make no image classifier of it"),
        (_unknown, "can make no image classifier of it .*nonesuch"),
        (_truncated, "can make no image classifier of it"),
    ],
)
def test_a_directory_of_something_else_is_one_line(tmp_path: Path, damage: Any, text: str) -> None:
    write_resnet(tmp_path, 4, image_mean=MEAN, image_std=STD)
    damage(tmp_path)
    with pytest.raises(ModelError, match=text) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("preprocessor", "options", "text"),
    [
        ({"image_mean": [0.5]}, {}, r"image_mean is \[0\.5\], wanted 3 numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, {}, "must be above 0"),
        (
            {"do_normalize": False},
            {"image_size": 24},
            r"cannot take images of 24 x 24 pixels .* set model\.i",
        ),
        ({"do_normalize": False}, {"shape": (4, 16, 16)}, "takes images of 3 channels, the data set's have 4"),
    ],
)
def test_images_that_cannot_fit_are_refused(tmp_path: Path, preprocessor: Any, options: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        load(write_vit(tmp_path, 4, **preprocessor), **options)


def test_code_that_lies_in_the_directory_is_not_run(tmp_path: Path) -> None:
    write_resnet(tmp_path, 4)
    values = json.loads((tmp_path / "config.json").read_text())
    values["auto_map"] = {
        "AutoConfig": "mine.ResNetConfig",
        "AutoModelForImageClassification": "mine.ResNetForImageClassification",
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "mine.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'owned')!r}).touch()")
    load(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_no_directory_and_a_directory_that_is_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such directory; nothing is downloaded"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="its description names the library 'elsewhere', wanted one of huggingface"):
        rebuild({"library": "elsewhere"}, SHAPE)


def test_transformers_is_imported_only_when_asked_for() -> None:
    code = "import sys, distrobust.train.job, distrobust.models; print({'transformers', 'timm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
