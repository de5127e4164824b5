"""Laws of the reference networks and of loading weights into them."""

import pytest
import torch
from torch import nn

from distrobust.errors import ConfigError, ModelError
from distrobust.models import MODELS, build, load_weights

torch.set_num_threads(1)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make(name: str = "resnet9", num_classes: int = 10, side: int = 16) -> nn.Module:
    return build(name, num_classes, (3, side, side), MEAN, STD, seed=1)


def in_channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_resnet9_has_the_size_written_down() -> None:
    # prep 432 + 32, layer1 4608 + 64 + 2 (9216 + 64), layer2 18432 + 128,
    # layer3 73728 + 256 + 2 (147456 + 256), head 1290
    assert num_parameters(make("resnet9", side=32)) == 412_954


def test_cnn_is_small() -> None:
    assert 60_000 < num_parameters(build("cnn", 10, (1, 8, 8), (0.5,), (0.5,))) < 120_000


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 33, 40)])
def test_maps_images_of_any_size_to_logits(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, 7, shape, [0.5] * shape[0], [0.25] * shape[0])
    assert model(torch.rand(2, *shape)).shape == (2, 7)


def test_top_level_names_tell_the_layer() -> None:
    assert {n.split(".")[0] for n, _ in make("resnet9").named_parameters()} == {
        *("prep", "layer1", "layer2", "layer3", "head")
    }
    assert {n.split(".")[0] for n, _ in make("cnn").named_parameters()} == {
        "stem",
        "layer1",
        "layer2",
        "head",
    }


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_is_inside_the_model(name: str) -> None:
    x = torch.rand(4, 3, 16, 16)
    plain = build(name, 10, (3, 16, 16), (0.0,) * 3, (1.0,) * 3, seed=1).eval()
    by_hand = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    torch.testing.assert_close(make(name).eval()(x), plain(by_hand))


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_gives_the_same_logits_and_trains(name: str) -> None:
    x = torch.rand(4, 3, 16, 16)
    contiguous, last = make(name), in_channels_last(make(name))
    logits = last(x.to(memory_format=torch.channels_last))
    # float32 sums of up to 1152 terms in another order: 8 layers of a relative error of sqrt(1152) 2^-24
    torch.testing.assert_close(logits, contiguous(x), rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert all(p.grad is not None for p in last.parameters())


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = make(), make(), build("resnet9", 10, (3, 16, 16), MEAN, STD, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(c.parameters()))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("resnet18", 10, (3, 32, 32), MEAN, STD), ModelError, "did you mean 'resnet9'"),
        (("cnn", 1, (3, 32, 32), MEAN, STD), ModelError, "num_classes is 1"),
        (("cnn", 10, (3, 4, 32), MEAN, STD), ModelError, "8 x 8 pixels"),
        (("cnn", 10, (1, 8, 8), MEAN, STD), ConfigError, "mean has 3 numbers for 1 channels"),
        (("cnn", 10, (3, 8, 8), MEAN, (0.2, 0.0, 0.2)), ConfigError, "std is .* above 0"),
        (("cnn", 10, (3, 8, 8), (float("nan"),) * 3, STD), ConfigError, "mean is .* finite"),
    ],
)
def test_impossible_models_are_refused_in_one_line(arguments: tuple, error: type, text: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=text) as caught:
        build(*arguments)
    assert "\n" not in str(caught.value)


def test_loading_copies_parameters_and_buffers_and_keeps_the_memory_format() -> None:
    source = build("resnet9", 10, (3, 16, 16), (0.1,) * 3, (0.9,) * 3, seed=5)
    source(torch.rand(4, 3, 16, 16))  # moves the batch-norm statistics
    target = in_channels_last(make())
    load_weights(target, source.state_dict(), "a.pt")
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    assert target.get_parameter("layer1.conv.weight").is_contiguous(memory_format=torch.channels_last)


def test_weights_that_do_not_fit_are_named_counted_and_not_applied() -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = dict(make(num_classes=100).state_dict())
    del state["prep.conv.weight"]
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(ModelError) as caught:
        load_weights(model, state, "run/last.pt")
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "run/last.pt",
        "1 missing (prep.conv.weight)",
        "1 unexpected (extra.weight)",
        "2 of another shape (head.weight is (100, 128), the model's is (10, 128), head.bias",
    ):
        assert part in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_the_first_few_names_are_listed() -> None:
    with pytest.raises(ModelError) as caught:
        load_weights(make(), {}, "x")
    assert f"{len(make().state_dict())} missing" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_of_a_wrapper_are_recognised(prefix: str) -> None:
    state = {prefix + name: value for name, value in make().state_dict().items()}
    with pytest.raises(ModelError, match="inner module"):
        load_weights(make(), state, "x")


def test_an_entry_that_is_no_tensor_is_named() -> None:
    with pytest.raises(ModelError, match=r"head\.bias is no tensor but float"):
        load_weights(make(), {**make().state_dict(), "head.bias": 1.0}, "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_maximum_before_the_relu_is_a_maximum_after_it_to_the_bit(dtype: torch.dtype) -> None:
    """Also where windows hold equal values, or none above zero."""
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, :4] -= 3
    x[:, :, 4:8] = x[:, :, 4:5]
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    found = []
    for layers in (nn.Sequential(relu, pool), nn.Sequential(pool, relu)):
        leaf = x.to(dtype).requires_grad_()
        y = layers(leaf)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found.append((y, *torch.autograd.grad(y, leaf, weights)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
