"""Reference networks, which need no other library: `cnn` for small images, `resnet9` for CIFAR-sized ones.

`cnn_gn` is `cnn` with group normalisation, 16 channels a group (Wu and He, ECCV 2018), for federated clients, who share
no batch statistics (Hsieh et al., ICML 2020, section 5). `mlp` (128 hidden units) and `linear` are for the smallest.

`resnet9` has the shape of DavidNet (David Page, "How to train your ResNet", 2018) at a quarter of its
width: prep 16, layer1 32 with a residual of two convolutions, layer2 64, layer3 128 with a residual,
global maximum, linear; 412,954 parameters for 10 classes at 3 x 32 x 32. Differences: no 0.125 scale
before the loss, and the global pooling adapts to the image size instead of being 4 x 4.

Every model maps float images in [0, 1], shape (B, C, H, W), to logits (B, num_classes). The first child,
`normalise`, subtracts mean and divides by std per channel, so an attack's budget is always in units of
the image. The names of the other children (`prep`, `layer1`, ..., `head`) are the groups under which
learning rates are reported.
"""

from __future__ import annotations

import difflib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distrobust.errors import ConfigError, ModelError

Shape = tuple[int, int, int]  # channels, height, width

GROUP_CHANNELS = 16  # of group norm
HIDDEN = 128  # of the MLP: 9,610 parameters on 8 x 8 digits
MIN_SIDE = 8  # pixels: both networks halve the image up to three times


class Normalise(nn.Module):
    """(x - mean) / std per channel. mean and std are buffers (1, C, 1, 1): they travel with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class GlobalMean(nn.Module):
    """(B, C, H, W) -> (B, C). Unlike nn.AdaptiveAvgPool2d its backward is deterministic on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class GlobalMax(nn.Module):
    """(B, C, H, W) -> (B, C). Unlike nn.AdaptiveMaxPool2d deterministic on CUDA; ties share the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=(2, 3))


class Residual(nn.Module):
    """x + second(first(x)); both are conv-norm-relu blocks of x's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _block(width, width)
        self.second = _block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return x + y


def _block(
    num_in: int, num_out: int, *, pool: bool = False, residual: bool = False, groups: bool = False
) -> nn.Sequential:
    """conv 3 x 3 - batch (or group) norm - relu, optionally with a 2 x 2 maximum, and a residual of two such blocks.

    The maximum comes before the relu, which is the same to the bit, gradients too, with a quarter of the relu's work.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(num_in, num_out, 3, padding=1, bias=False),
        norm=nn.GroupNorm(num_out // GROUP_CHANNELS, num_out) if groups else nn.BatchNorm2d(num_out),
    )
    if pool:
        parts["pool"] = nn.MaxPool2d(2)
    parts["relu"] = nn.ReLU(inplace=True)
    if residual:
        parts["residual"] = Residual(num_out)
    return nn.Sequential(parts)


def _cnn(shape: Shape, num_classes: int, *, groups: bool = False) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        stem=_block(shape[0], 32, groups=groups),
        layer1=_block(32, 64, pool=True, groups=groups),
        layer2=_block(64, 96, pool=True, groups=groups),
        pool=GlobalMean(),
        head=nn.Linear(96, num_classes),
    )


def _cnn_gn(shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
    return _cnn(shape, num_classes, groups=True)


def _mlp(shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        flatten=nn.Flatten(),
        layer1=nn.Linear(math.prod(shape), HIDDEN),
        relu=nn.ReLU(inplace=True),
        head=nn.Linear(HIDDEN, num_classes),
    )


def _linear(shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(flatten=nn.Flatten(), head=nn.Linear(math.prod(shape), num_classes))


def _resnet9(shape: Shape, num_classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        prep=_block(shape[0], 16),
        layer1=_block(16, 32, pool=True, residual=True),
        layer2=_block(32, 64, pool=True),
        layer3=_block(64, 128, pool=True, residual=True),
        pool=GlobalMax(),
        head=nn.Linear(128, num_classes),
    )


MODELS: Mapping[str, Callable[[Shape, int], OrderedDict[str, nn.Module]]] = {
    "cnn": _cnn,
    "resnet9": _resnet9,
    "cnn_gn": _cnn_gn,
    "mlp": _mlp,
    "linear": _linear,
}


def build(
    name: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    seed: int | None = None,
) -> nn.Module:
    """A freshly initialised model in training mode, float32, on the CPU.

    name: a key of MODELS. image_shape: (channels, height, width), sides of at least 8 pixels. mean, std:
    one number per channel in image units ([0, 1]), std > 0. seed: the initial weights are a function of
    it and torch's global generator is left alone; None draws from the global generator, as torch's layers
    do.

    Raises ModelError for an unknown name or impossible shapes, ConfigError for impossible mean or std.
    """
    if name not in MODELS:
        closest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
        hint = f"did you mean {closest[0]!r}? " if closest else ""
        raise ModelError(f"model: unknown name {name!r}; {hint}valid: {', '.join(MODELS)}")
    num_channels, height, width = image_shape
    if num_classes < 2:
        raise ModelError(f"model {name}: num_classes is {num_classes}, needs at least 2")
    if num_channels < 1 or min(height, width) < MIN_SIDE:
        raise ModelError(
            f"model {name}: images of shape {tuple(image_shape)} (channels, height, width) are too small; "
            f"needs at least 1 channel and {MIN_SIDE} x {MIN_SIDE} pixels"
        )
    for what, values, low in (("mean", mean, -math.inf), ("std", std, 0.0)):
        if len(values) != num_channels:
            raise ConfigError(f"model {name}: {what} has {len(values)} numbers for {num_channels} channels")
        if not all(math.isfinite(v) and v > low for v in values):
            wanted = "finite" if what == "mean" else "finite and above 0"
            raise ConfigError(f"model {name}: {what} is {list(values)}; every number must be {wanted}")
    with seeded(seed):
        layers = MODELS[name](image_shape, num_classes)
    return nn.Sequential(OrderedDict(normalise=Normalise(mean, std), **layers))


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """What is drawn inside follows from `seed`, and torch's global generator is as it was afterwards. None: neither."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
