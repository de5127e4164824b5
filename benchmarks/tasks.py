"""What the benchmarks of step sizes train: a small GPT on characters, and the 9-layer residual network on CIFAR-10,
from scratch without adversary or from a natural model against N-FGSM examples (8/255, full strength from the start).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accuracy import EPS, train_on
from gpt import GPT, Text, loss_of
from torch import Tensor, nn

from distrobust import data
from distrobust.adversarial import losses
from distrobust.adversarial.attacks import Attack
from distrobust.adversarial.folded import Folded
from distrobust.adversarial.threat import Threat
from distrobust.train.modelfile import build_model, load_model_file
from distrobust.train.randomness import generator_at
from distrobust.train.scoring import spaced_rows

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """A model and a loss. `steps`: of a whole run."""

    steps: int

    def make(self, seed: int) -> nn.Module: ...

    def batches(self, seed: int) -> Iterator[Batch]:
        """Global batches, without end."""
        ...

    def backward(self, net: nn.Module, batch: Batch, seed: int, step: int, rank: int, num_workers: int) -> float:
        """Gradients of one worker's share of a batch; its mean loss."""
        ...

    def held_out_loss(self, net: nn.Module) -> float: ...


class Language:
    """Next characters of a text: batches of 32 x 64."""

    steps = 600

    def __init__(self, text: Path) -> None:
        self.text = Text(text)

    def make(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return GPT(self.text.vocabulary)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield (self.text.rows(32, generator),)

    def backward(self, net: nn.Module, batch: Batch, seed: int, step: int, rank: int, num_workers: int) -> float:
        loss = loss_of(net, batch[0][rank::num_workers])
        loss.backward()
        return float(loss.detach())

    def held_out_loss(self, net: nn.Module) -> float:
        with torch.no_grad():
            return float(loss_of(net, self.text.held_out_rows(128)))


class Images:
    """CIFAR-10, batches of 256, bf16; `natural`: directory with 0.pt, 1.pt and 2.pt to start from, against N-FGSM."""

    def __init__(self, folder: Path, natural: Path | None) -> None:
        self.natural = natural
        self.source = data.describe(folder, "train")
        shard = data.Shard(data.describe(folder, "test"), 0, 1, seed=0)
        self.held_out = list(spaced_rows(shard, 500, 250))
        self.attack = None if natural is None else Attack("n_fgsm")
        self.attacked: Folded | None = None
        self.steps = 300 if natural is None else 196

    def make(self, seed: int) -> nn.Module:
        net = build_model("resnet9", self.source, seed=seed)
        if self.natural is not None:
            load_model_file(net, self.natural / f"{seed % 3}.pt")
        return net.to(memory_format=torch.channels_last)

    def batches(self, seed: int) -> Iterator[Batch]:
        shard, epoch = data.Shard(self.source, 0, 1, seed), 0
        while True:
            yield from shard.batches(epoch, 256)
            epoch += 1

    def backward(self, net: nn.Module, batch: Batch, seed: int, step: int, rank: int, num_workers: int) -> float:
        if self.attack is not None and (self.attacked is None or self.attacked.model is not net):
            self.attacked = Folded(net, batch[0][:2] / 255)
        return train_on(net, self.attacked, *batch, self.attack, Threat("linf", EPS), seed, step, rank, num_workers)

    def held_out_loss(self, net: nn.Module) -> float:
        net.eval()
        total = 0.0
        for number, (images, labels) in enumerate(self.held_out):
            x = images.float().div(255).contiguous(memory_format=torch.channels_last)
            generator = generator_at(x.device, 0, number)
            with torch.autocast("cpu", torch.bfloat16):
                if self.attack is None:
                    with torch.no_grad():
                        output = losses.Natural()(net, net, x, labels)
                else:
                    attack, threat = Attack("pgd", steps=5), Threat("linf", EPS)
                    output = losses.PGDAT()(net, net, x, labels, attack, threat, generator)
            total += float(output.loss.detach()) / len(self.held_out)
        net.train()
        net.zero_grad(set_to_none=True)
        return total


def tasks(text: Path | None, images: Path | None, natural: Path | None) -> dict[str, Any]:
    """Those for which there is data."""
    found: dict[str, Task] = {}
    if text is not None:
        found["gpt"] = Language(text)
    if images is not None:
        found["natural"] = Images(images, None)
        if natural is not None:
            found["n_fgsm"] = Images(images, natural)
    return found
