"""Clean and robust accuracy of a model over batches of images, or texts: our attacks, and foolbox's to check them by.

An image counts as robust only if the model is right on it **and** on the adversarial image made from it.
Evaluation is in float32 (autocast is switched off), in evaluation mode, on contiguous NCHW images in [0,
1], on the inner module, never on a DDP wrapper. accuracy.py turns the counts into a number.

Random numbers of batch i come from a generator seeded with (seed, i) alone: a batch's result depends
neither on the batches before it nor on what else the process draws. It does depend on how images are
grouped into batches. A rank that evaluates a share of the batches passes their global numbers as
`indices`, and the sum over ranks is what one process would get.

Our own PGD is not enough evidence for a number: `foolbox_pgd` is an independent implementation to hold
against it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distrobust.adversarial.attacks import Attack, cross_entropy_sum, evaluation_mode, input_gradient
from distrobust.adversarial.points import Embeds, Points
from distrobust.adversarial.threat import Norm, Threat
from distrobust.errors import ConfigError, DataError
from distrobust.evaluation.accuracy import Counts
from distrobust.evaluation.libraries import foolbox_examples, require

# images (B, C, H, W), float in [0, 1] or uint8 in 0..255, or tokens (B, L) of a text; labels (B,) of any integer type
Batches = Iterable[tuple[Tensor, Tensor]]


def count_correct(
    model: nn.Module,
    batches: Batches,
    attack: Attack | None,
    threat: Threat | None,
    seed: int,
    *,
    indices: Iterable[int] | None = None,
) -> Counts:
    """Images of `batches` on which `model` (the inner module) is right, and stays right under `attack`.

    attack, threat: both None for clean accuracy. seed: of the attack's random start. indices: the global
    number of each batch, default 0, 1, 2, ...; rank r of N with every N-th batch passes
    itertools.count(r, N). Batches go to the device of the model; results are fetched at the end. Raises
    ConfigError for an attack without threat, and for n_fgsm, whose examples leave the ball; DataError for
    float images outside [0, 1].
    """
    if attack is not None and attack.name != "none" and threat is None:
        raise ConfigError(f"evaluation: attack {attack.name!r} needs a threat (norm and eps)")
    if attack is not None and attack.name == "n_fgsm":
        raise ConfigError("evaluation: n_fgsm leaves the ball of radius eps, so it measures no robustness; use pgd")
    tally = _Tally(model)
    for inputs, y, generator in prepared(model, batches, seed, indices):
        with _float32_evaluation(model, inputs.device):
            points = Points.of(model, inputs)
            x, seen = points.x, points.seen_by(model)
            if attack is None or threat is None or attack.name == "none":
                right = _predict(seen, x) == y
            else:
                # The clean pass also yields the input gradient: one backward, shared by both gradient flags.
                gradient, logits = input_gradient(seen, x, y, cross_entropy_sum)
                x_adv = attack(seen, x, y, points.ball(threat), generator)
                right = (logits.argmax(1) == y) & (_predict(seen, x_adv) == y)
                tally.gradients(gradient)
        tally.images(right, y)
    return tally.counts()


def foolbox_pgd(
    model: nn.Module,
    batches: Batches,
    eps: float,
    steps: int,
    *,
    norm: Norm = "linf",
    seed: int = 0,
    indices: Iterable[int] | None = None,
) -> Counts:
    """count_correct under foolbox's PGD with random start: an implementation independent of ours, to
    check it by.

    foolbox draws from torch's global generators, which are seeded per batch inside and restored. Its backward
    passes would fill parameters' .grad, so the parameters are frozen meanwhile. Raises ConfigError if foolbox
    is not installed.
    """
    require("foolbox")
    threat = Threat(norm, eps)
    tally = _Tally(model)
    for x, y, generator in prepared(model, batches, seed, indices):
        with settled(model, generator):
            x_adv = foolbox_examples(model, x, y, threat, steps)
            right = (_predict(model, x) == y) & (_predict(model, x_adv) == y)
        tally.images(right, y)
    return tally.counts()


@contextmanager
def settled(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """`model` for an attack that does as it likes: float32, evaluation mode, frozen parameters, and torch's
    global generators seeded like `generator`; everything is as before afterwards."""
    with _float32_evaluation(model, generator.device), _frozen(model), _global_seed(generator):
        yield


class _Tally:
    """Sums on the device; one synchronisation, in counts()."""

    def __init__(self, model: nn.Module) -> None:
        self._started = time.perf_counter()
        self._training = int(any(module.training for module in model.modules()))
        self._right: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._zero: list[Tensor] = []
        self._nonfinite: list[Tensor] = []

    def images(self, right: Tensor, y: Tensor) -> None:
        self._right.append(right)
        self._labels.append(y)

    def gradients(self, gradient: Tensor) -> None:
        per_image = gradient.flatten(1)
        self._zero.append((per_image == 0).all(1).sum())
        self._nonfinite.append((~per_image.isfinite()).any(1).sum())

    def counts(self) -> Counts:
        labels = torch.cat(self._labels).cpu() if self._labels else torch.empty(0, dtype=torch.int64)
        right = torch.cat(self._right).cpu() if self._right else torch.empty(0, dtype=torch.bool)
        samples = torch.bincount(labels)
        correct = torch.bincount(labels[right], minlength=len(samples))
        return Counts(
            tuple(correct.tolist()),
            tuple(samples.tolist()),
            sum(int(t) for t in self._zero),
            sum(int(t) for t in self._nonfinite),
            self._training,
            time.perf_counter() - self._started,
        )


def prepared(
    model: nn.Module, batches: Batches, seed: int, indices: Iterable[int] | None
) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
    """Float32 contiguous images in [0, 1], or tokens as they are, int64 labels, and the batch's own generator, on
    the model's device. DataError for float images outside [0, 1]."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    numbers = iter(itertools.count() if indices is None else indices)
    for x, y in batches:
        index = next(numbers, None)
        if index is None:
            raise ValueError("count_correct: fewer indices than batches")
        generator = torch.Generator(device).manual_seed(batch_seed(seed, index))
        if isinstance(model, Embeds):
            yield x.to(device), y.to(device, torch.int64), generator
            continue
        scale = 255.0 if x.dtype == torch.uint8 else 1.0
        if x.numel() and not (x.min() >= 0 and x.max() <= scale):
            raise DataError(
                f"evaluation: batch {index}: float images are in [{x.min():.4g}, {x.max():.4g}]; needs [0, 1], "
                "not normalised (normalisation belongs inside the model), or uint8"
            )
        x = x.to(device).to(torch.float32).div(scale).contiguous()
        yield x, y.to(device, torch.int64), generator


def batch_seed(seed: int, index: int) -> int:
    """A well-mixed 63-bit seed for batch `index`: neighbours share nothing (one round of splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1


@torch.no_grad()
def _predict(model: nn.Module, x: Tensor) -> Tensor:
    return torch.as_tensor(model(x)).argmax(1)


@contextmanager
def _float32_evaluation(model: nn.Module, device: torch.device) -> Iterator[None]:
    with evaluation_mode(model), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _global_seed(generator: torch.Generator) -> Iterator[None]:
    """torch's global generators of the CPU and of the generator's device seeded like it; restored
    afterwards."""
    devices = [generator.device] if generator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(generator.initial_seed())
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(generator.initial_seed())
        yield
