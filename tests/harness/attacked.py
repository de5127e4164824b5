"""A small network and images that tests of evaluations share, and models that hide their gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 5
Batch = tuple[Tensor, Tensor]


def trained(num_images: int, batch_size: int) -> tuple[nn.Module, list[Batch]]:
    """A small network after 60 steps on noisy class prototypes, in evaluation mode; batches of other images."""
    g = torch.Generator().manual_seed(0)
    prototypes = torch.rand(CLASSES, 1, 8, 8, generator=g)

    def batch(num: int) -> Batch:
        y = torch.randint(CLASSES, (num,), generator=g)
        return (prototypes[y] + 0.4 * torch.randn(num, 1, 8, 8, generator=g)).clamp(0, 1), y

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, CLASSES)
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        x, y = batch(32)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    sizes = [min(batch_size, num_images - start) for start in range(0, num_images, batch_size)]
    return model.eval(), [batch(size) for size in sizes]


class Saturated(nn.Module):
    """Logits a million times too large: the softmax is exact, and the loss is flat where the model is right."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1e6 * torch.as_tensor(self.inner(x))


class Quantised(nn.Module):
    """Rounds the image to nine levels: the gradient is zero everywhere."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner((8 * x).round() / 8))


class Noisy(nn.Module):
    """Adds noise to the image, also in evaluation mode."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x + 0.1 * torch.randn_like(x)))


class Detached(nn.Module):
    """Cuts the graph at the image; its parameters still have gradients."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x.detach()))


class Probabilities(nn.Module):
    """Ends with a softmax."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x)).softmax(1)
