"""How many images went through a model, forwards and backwards: what an attack really spent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Passes:
    """forward, backward: images, not batches. A backward pass counts each time one goes through the output."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counted(*models: nn.Module) -> Iterator[Passes]:
    """Counts the passes through all of `models` together while the block runs, by hooks; whoever calls them."""
    passes = Passes()

    def count(_: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        num = len(args[0])
        passes.forward += num
        if isinstance(output, Tensor) and output.requires_grad:

            def back(_: Tensor) -> None:
                passes.backward += num

            output.register_hook(back)

    with ExitStack() as stack:
        for model in models:
            stack.callback(model.register_forward_hook(count).remove)
        yield passes
