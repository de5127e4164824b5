"""Training across slow links, without giving up accuracy or robustness.

model = DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
compression = distrobust.compress(model, optimizer, density=0.001, num_steps=len(loader) * epochs)
...                                                                   # the loop stays as it was
torch.save({"model": ..., "compression": compression.state_dict()}, path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from distrobust.comm.state import Compression

__version__ = "0.1.0"
__all__ = ["__version__", "compress"]


def compress(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, density: float = 0.001, **options: Any
) -> Compression:
    """Registers the compression hook on `model` and moves momentum and weight decay out of `optimizer` into it.

    density: fraction of coordinates sent per step, in (0, 1].

    Options:
        num_steps: length of the run in optimizer steps; without it there is no warm-up.
        warmup: share of the run spent on the paper's ladder of densities (0.2).
        values: "fp16", "bf16" or "fp32" on the wire; rounding stays in the residual.
        selector: "sampled" or "exact"; both select the same coordinates.
        momentum: "residual" (the optimizer must be torch.optim.SGD) or "optimizer" (plain error feedback under it).
        masking: momentum factor masking (True).
        clip: threshold of the global gradient norm, applied per tensor to clip/sqrt(N) before accumulation.
        fuse_below: tensors with fewer elements are selected together (2048).
        scaler: a torch.amp.GradScaler; the residual is then stored unscaled.

    Returns the state to save beside the model: `state_dict()`, `load_state_dict()`, `sent_bytes`, `skipped`.
    Raises ConfigError for impossible values and for optimizers it cannot take momentum from. Deep Gradient Compression,
    Lin et al., ICLR 2018; differences from the paper are listed in the README.
    """
    from distrobust.comm.hook import attach

    return attach(model, optimizer, density, **options)
