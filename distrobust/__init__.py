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
    from collections.abc import Sequence

    import torch
    from torch.nn.parallel import DistributedDataParallel

    from distrobust.comm.state import Compression
    from distrobust.optim.adaptive import NoiseAdaptive
    from distrobust.optim.lanton import Lanton

__version__ = "0.1.0"
__all__ = ["Lanton", "NoiseAdaptive", "__version__", "compress", "resize"]


def __getattr__(name: str) -> Any:
    """The optimizers, whose modules need torch: `import distrobust` alone does not load it."""
    if name == "NoiseAdaptive":
        from distrobust.optim.adaptive import NoiseAdaptive

        return NoiseAdaptive
    if name == "Lanton":
        from distrobust.optim.lanton import Lanton

        return Lanton
    raise AttributeError(f"module 'distrobust' has no attribute {name!r}")


def compress(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    density: float | str = 0.001,
    **options: Any,
) -> Compression:
    """Registers the compression hook on `model` and moves momentum and weight decay out of `optimizer` into it.

    optimizer: one, or several that share the model's parameters (Muon for matrices, AdamW for the rest); Accelerate's
    and Lightning's wrappers are seen through. A NoiseAdaptive or Lanton is told the noise of whole gradients.
    density: fraction of coordinates sent per step, in (0, 1], or "auto" with fewer_bytes.

    Options:
        num_steps: length of the run in optimizer steps; without it there is no warm-up and no denser end.
        fewer_bytes: with density "auto", how many times fewer bytes than dense the whole run shall send.
        exchange_s: with density "auto" instead, seconds a step may spend sending, on the link as measured now; a run
            that continues with as many ranks keeps the density it had.
        step_ahead: compute each rank's gradient where its own unsent update will lead, without warm-up and masking;
            torch.optim.SGD only (False).
        warmup: share of the run spent on the paper's ladder of densities (0.2, or 0 with step_ahead).
        final_steps, final_density: the last steps of the run, sent at that density (0, 1.0).
        values: "fp32", "fp16", "bf16", "int8", "4bit", "2bit" or "sign" on the wire ("4bit"); rounding stays in the
            residual.
        indices: "elias_fano", or "rice", half a bit shorter.
        exchange: "all_gather", "sharded" (pays with many ranks), "hierarchical" (dense inside a machine) or "auto",
            which takes the one that sends least and logs why.
        selector: "sampled" or "exact"; both select the same coordinates.
        momentum: "residual" (the optimizer must be torch.optim.SGD) or "optimizer" (plain error feedback under it).
        masking: momentum factor masking (True, or False with step_ahead).
        clip: threshold of the global gradient norm, applied per tensor to clip/sqrt(N) before accumulation.
        fuse_below: tensors with fewer elements are selected together (2048).
        scaler: a torch.amp.GradScaler; the residual is then stored unscaled.

    One exchanged backward a step: accumulate under `with model.no_sync():` for all but the last micro-batch. A training
    forward while an exchanged gradient is neither stepped on nor cleared raises ConfigError.

    Returns the state to save beside the model: `state_dict()`, `load_state_dict()`, `sent_bytes`, `skipped`.
    Raises ConfigError for impossible values and for optimizers it cannot take momentum from. Deep Gradient Compression,
    Lin et al., ICLR 2018; differences from the paper are listed in the README.
    """
    from distrobust.comm.hook import attach

    return attach(model, optimizer, density, **options)


def resize(states: list[dict[str, Any]], rank: int, num_ranks: int) -> dict[str, Any]:
    """The `state_dict()`s of all ranks of a run, in rank order -> the state of rank `rank` of `num_ranks`.

    For continuing with another number of workers: nothing that waits in the residuals is lost. Raises CheckpointError.
    """
    from distrobust.comm.resize import resize as resized

    return resized(states, rank, num_ranks)
