"""What an exchange of one bucket is given, and the mean it returns."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from distrobust.comm.line import Part
from distrobust.comm.transport import Local, Request, Transport
from distrobust.compression import native
from distrobust.compression.codec import Code
from distrobust.compression.memory import Residual

Exchange = Generator[Request | Local, Tensor, "Mean"]


@dataclass
class Mean:
    """What the ranks agreed on for one bucket. `finite` is False when some rank's gradient was not.

    Either `flat` (bucket,) float32, or the `payloads` to add up: places (k,) in the bucket and values (k,), already
    divided by the number of ranks.
    """

    finite: bool = True
    flat: Tensor | None = None
    payloads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    fused: Tensor | None = None  # (sum of all fused parameters,) float32, in the last bucket only
    used: dict[str, bool] = field(default_factory=dict)  # whether any rank had a gradient
    side: dict[str, Tensor] = field(default_factory=dict)  # (num_ranks, numbers): what each rank observed
    side_is_local: bool = False  # observed on local gradients, before they were compressed

    def write(self, bucket: Tensor, scale: float) -> None:
        """Overwrites `bucket` with the mean times `scale`."""
        if self.flat is not None:
            bucket.copy_(self.flat if scale == 1.0 else self.flat * scale)
            return
        payloads = [(places, (v if scale == 1.0 else v * scale).to(bucket.dtype)) for places, v in self.payloads]
        if bucket.dtype == torch.float32 and native.takes(bucket, *(tensor for pair in payloads for tensor in pair)):
            native.scatter(bucket, payloads)
            return
        bucket.zero_()
        for places, values in payloads:
            bucket.index_add_(0, places, values)


class Observer(Protocol):
    """Looks at every gradient before it is compressed; `width` numbers a parameter travel in the message.

    `wants_mean`: in dense phases it compares this rank's gradient with the mean, and one number a parameter travels in
    a second hop, in steps that are due; otherwise it observes the mean, and nothing travels. `is_due`: the step under
    way measures; the same on every rank, and unchanged until `commit`.
    """

    width: int
    wants_mean: bool

    @property
    def is_due(self) -> bool: ...

    def observe(self, name: str, gradient: Tensor) -> Tensor:
        """(width,) float32 for a gradient (n,), local in a sparse phase, the mean over ranks in a dense one."""
        ...

    def compare(self, name: str, gradient: Tensor, mean: Tensor) -> Tensor:
        """(1,) float32 for this rank's gradient (n,) and the mean (n,)."""
        ...

    def commit(self, rows: dict[str, Tensor], is_local: bool) -> None:
        """The step was taken. rows: (num_ranks, numbers) of every parameter, the same on all ranks; none if not due."""
        ...


@dataclass(frozen=True)
class Settings:
    """What stays the same from bucket to bucket."""

    transport: Transport
    code: Code
    selector: str
    detect_unused: bool
    observer: Observer | None
    exchange: str = "all_gather"


@dataclass(frozen=True)
class Step:
    """What the buckets of one backward pass share."""

    number: int
    density: float
    scale: float  # loss scale of the gradients, 1.0 without a GradScaler
    fused: dict[str, Residual]  # small parameters, in the model's order, selected together
    num_fused: dict[str, int]  # their numbers of elements


@dataclass(frozen=True)
class Bucket:
    """DDP's bucket `flat` (n,), which the mean will overwrite, and the parameters in it."""

    flat: Tensor
    parts: list[Part]
    is_last: bool


class Verdict:
    """Whether this rank's gradients have been finite so far in this pass."""

    finite = True


def unscaled(part: Part, scale: float) -> Tensor:
    """The part's gradient without the loss scale."""
    return part.gradient.to(torch.float32) / scale if scale != 1.0 else part.gradient


def had_gradients(settings: Settings, parts: list[Part]) -> Tensor:
    """(parts,) bool: whether this rank had a gradient; DDP leaves zeros for a parameter that was not used."""
    if settings.detect_unused:
        return torch.stack([(part.gradient != 0).any() for part in parts])
    return torch.ones(len(parts), dtype=torch.bool, device=parts[0].gradient.device)
