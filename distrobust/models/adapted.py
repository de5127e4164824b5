"""Another library's classifier behind this package's convention: images in [0, 1] in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrobust.models.reference import Normalise


class Adapted(nn.Module):
    """float images in [0, 1], (B, C, H, W) -> logits (B, num_classes), differentiable in the image throughout.

    `network` gets images of `mean` and `std` per channel, resized (bilinear, smoothed where they shrink) to `size`,
    (height, width), if that is given; a gray image is repeated for a network of more channels. Its answer is the
    logits or has them as `.logits`. An attack's budget stays in units of the image as it came, before the resize.
    """

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], size: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.network = network
        self.num_channels, self.size = len(mean), size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1 and self.num_channels > 1:
            x = x.expand(-1, self.num_channels, -1, -1)
        if self.size is not None and x.shape[2:] != self.size:
            shrinks = x.shape[2] > self.size[0] or x.shape[3] > self.size[1]
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=shrinks)
        output: Any = self.network(self.normalise(x))
        return output if isinstance(output, Tensor) else torch.as_tensor(output.logits)


def freeze_unused_(model: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """Names of the parameters that no logit depends on (a masking token, say), of `model`, where they are frozen.

    DistributedDataParallel would wait for their gradients, which never come.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = model(torch.full((1, *image_shape), 0.5, device=device))
    gradients = torch.autograd.grad(logits.sum(), list(named.values()), allow_unused=True)
    model.train(training)
    unused = [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]
    for name in unused:
        named[name].requires_grad_(False)
    return unused
