"""What does the local part of a step cost, beside a plain copy of the memory it has to touch?

    python benchmarks/local_part.py

One rank, one thread, ResNet-50's 161 tensors (25,557,032 parameters) in DDP's buckets of 25 MB: accumulate, select,
encode and clear, up to the finished messages. The copy moves the same bytes: read g, u, v, write u, v. The two
alternate.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import record
import torch
from torch import Tensor

from distrobust.bench.shapes import ResNet50Shape
from distrobust.comm.bucket import Bucket, Settings, Step, Verdict
from distrobust.comm.exchange import EXCHANGES
from distrobust.comm.line import Part
from distrobust.comm.together import in_process
from distrobust.compression import native
from distrobust.compression.accumulate import Piece, accumulate_and_select
from distrobust.compression.codec import INDEX_CODES, VALUE_CODES, Code
from distrobust.compression.memory import Residual, Rule
from distrobust.compression.select import num_selected

FIRST_BUCKET, BUCKET = 2**20 // 4, 25 * 2**20 // 4  # floats, as DDP cuts them
FUSE_BELOW, MOMENTUM = 2048, 0.9
WARM, TIMED = 30, 15


def one_rank(density: float, values: str, indices: str) -> tuple[Settings, Step, list[Bucket]]:
    """A rank of two and its buckets, filled with heavy-tailed gradients, in the order of a backward pass."""
    generator = torch.Generator().manual_seed(0)
    parameters = list(ResNet50Shape().named_parameters())[::-1]
    groups: list[list[tuple[str, Tensor]]] = [[]]
    size, cap = 0, FIRST_BUCKET
    for name, parameter in parameters:
        if size + parameter.numel() > cap and groups[-1]:
            groups.append([])
            size, cap = 0, BUCKET
        groups[-1].append((name, parameter))
        size += parameter.numel()
    fused: dict[str, Residual] = {}
    buckets = []
    for group in groups:
        flat = torch.empty(sum(parameter.numel() for _, parameter in group))
        torch.randn(flat.shape, generator=generator, out=flat)
        parts, at = [], 0
        for name, parameter in group:
            n = parameter.numel()
            scale = 10 ** (-3 * torch.rand((), generator=generator))  # layers differ
            here = flat[at : at + n]
            here.mul_(torch.randn(n, generator=generator).exp_()).mul_(scale)
            residual = Residual(n, Rule(momentum=MOMENTUM), here.device)
            parts.append(Part(name, at, here, torch.zeros(n), residual))
            if n < FUSE_BELOW:
                fused[name] = residual
            at += n
        buckets.append(Bucket(flat, parts, group is groups[-1]))
    settings = Settings(in_process(2)[0], Code(VALUE_CODES[values], INDEX_CODES[indices]), "sampled", False, None)
    sizes = {name: residual.v.numel() for name, residual in fused.items()}
    return settings, Step(0, density, 1.0, fused, sizes), buckets


@dataclass
class Rank:
    settings: Settings
    step: Step
    buckets: list[Bucket]

    def local_part(self) -> None:
        exchange = EXCHANGES["all_gather"][0]
        for bucket in self.buckets:
            next(exchange(self.settings, self.step, bucket, Verdict()))

    def one_pass(self) -> None:
        """Of the local part: accumulate and select, for the large tensors."""
        for bucket in self.buckets:
            for part in bucket.parts:
                n = part.gradient.numel()
                if n >= FUSE_BELOW:
                    piece = [Piece(0, n, num_selected(n, self.step.density))]
                    accumulate_and_select(part.residual, part.gradient, part.weight, 1.0, piece, "sampled")

    @contextlib.contextmanager
    def without_c(self) -> Iterator[None]:
        """As where there is no compiler."""
        library, native.library = native.library, lambda: None
        try:
            yield
        finally:
            native.library = library

    def next_step(self) -> None:
        """Untimed: commits, and turns every gradient around, so that the next step has others."""
        for bucket in self.buckets:
            for part in bucket.parts:
                part.residual.commit(settled=False)
                part.gradient.copy_(part.gradient.roll(7919))

    def copy(self) -> None:
        """Reads g, u and v, writes u and v."""
        for bucket in self.buckets:
            for part in bucket.parts:
                residual, half = part.residual, part.gradient.numel() // 2
                residual.next_u.copy_(part.gradient)
                residual.next_v.copy_(residual.u)
                residual.next_v[:half].copy_(
                    residual.v[:half]
                )  # the third read; its half write stands for a whole read


def milliseconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for density, values, indices in ((0.01, "4bit", "rice"), (0.001, "4bit", "rice"), (0.001, "fp16", "elias_fano")):
        rank = Rank(*one_rank(density, values, indices))
        for _ in range(WARM):
            rank.local_part()
            rank.next_step()
        times: dict[str, list[float]] = {"copy": [], "pass": [], "local part": []}
        times |= {"pass without C": [], "local part without C": []}
        for _ in range(TIMED):
            times["copy"].append(milliseconds(rank.copy))
            times["pass"].append(milliseconds(rank.one_pass))
            times["local part"].append(milliseconds(rank.local_part))
            with rank.without_c():
                times["pass without C"].append(milliseconds(rank.one_pass))
                times["local part without C"].append(milliseconds(rank.local_part))
            rank.next_step()
        medians = {name: statistics.median(values) for name, values in times.items()}
        row: dict[str, Any] = {"density": density, "values": values, "indices": indices, "milliseconds": medians}
        row["quartiles"] = {name: statistics.quantiles(values, n=4)[::2] for name, values in times.items()}
        row["times_a_copy"] = medians["local part"] / medians["copy"]
        rows.append(row)
        print(f"{density:.2%} {values} {indices}: {medians}, {row['times_a_copy']:.2f} times a copy", flush=True)
    print(record.write("local_part", (__doc__ or "").splitlines()[0], {"threads": 1, "rows": rows}))


if __name__ == "__main__":
    main()
