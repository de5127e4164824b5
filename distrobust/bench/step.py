"""Step time and bytes of every method, side by side: the half that runs in the hosts.

Methods take turns within a round, and rounds are repeated, so that a machine that becomes slower hits all alike. A
step is one backward pass through DistributedDataParallel without an optimizer: gradients into buckets, compression,
exchange, decoding. Bytes are the kernel's counts of this host (see `counters`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distrobust.bench.methods import Method
from distrobust.bench.rank import Say, process_group, resolve
from distrobust.bench.shapes import NUM_PARAMETERS, Pool, ResNet50Shape, share_storage_
from distrobust.lab.counters import Wire, tcp_sent_bytes, wire_sent


@dataclass
class Contender:
    """A method with its own wrapped model; `counted` is what its `install` returned."""

    method: Method
    model: DistributedDataParallel
    counted: Any
    step: int = 0

    @property
    def sent_bytes(self) -> int | None:
        return getattr(self.counted, "sent_bytes", None)


def measure(arguments: dict[str, Any], say: Say) -> dict[str, list[dict[str, Any]]]:
    """Arguments: `methods` (as of Method.to_json), `steps`, `interface` (to count bytes at, or None), `timeout_s`.

    Returns for every method one record per round: `seconds`, `tcp_bytes`, `counted_bytes` (by the method itself, or
    None), `wire_bytes` and `packets` (None without an interface), all of this rank.
    """
    methods = [Method(**values) for values in arguments["methods"]]
    records: dict[str, list[dict[str, Any]]] = {method.name: [] for method in methods}
    with process_group(arguments["timeout_s"]):
        pool = Pool(NUM_PARAMETERS, seed=dist.get_rank())
        ready = contenders(methods)
        for contender in ready:
            for _ in range(contender.method.warmup):
                backward(contender, pool)
        say({"round": 0})
        for round_ in range(arguments["steps"]):
            first = round_ % len(ready)  # each method follows another one in every round
            for contender in ready[first:] + ready[:first]:
                records[contender.method.name].append(_measured(contender, pool, arguments["interface"]))
            say({"round": round_ + 1})
    return records


def contenders(methods: list[Method]) -> list[Contender]:
    """Every method installed on a model of its own, all with the same weights."""
    with torch.device("meta"):  # no time for random weights
        models = [ResNet50Shape() for _ in methods]
    for model in models:
        model.to_empty(device="cpu")
    for parameter in models[0].parameters():
        parameter.data.zero_()
    share_storage_(list(models))
    made = []
    for method, model in zip(methods, models, strict=True):
        # init_sync: rank 0 would send 102 MB across the slow link to start with; nobody reads the weights
        settings = {"gradient_as_bucket_view": True, "init_sync": False, **method.ddp}
        wrapped = DistributedDataParallel(model, **settings)
        made.append(Contender(method, wrapped, resolve(method.install)(wrapped, **method.options)))
    return made


def backward(contender: Contender, pool: Pool) -> float:
    """One step; seconds of the backward pass alone."""
    contender.model.zero_grad(set_to_none=True)
    loss = contender.model(pool, contender.step)
    contender.step += 1
    dist.barrier()
    started = time.perf_counter()
    loss.backward()
    return time.perf_counter() - started


def _measured(contender: Contender, pool: Pool, interface: str | None) -> dict[str, Any]:
    dist.barrier()
    wire, tcp, counted = _wire(interface), tcp_sent_bytes(), contender.sent_bytes
    seconds = backward(contender, pool)
    dist.barrier()  # what the others still had to send is sent: counts are complete
    tcp_after, wire_after, counted_after = tcp_sent_bytes(), _wire(interface), contender.sent_bytes
    return {
        "seconds": seconds,
        "tcp_bytes": tcp_after - tcp,
        "counted_bytes": None if counted is None or counted_after is None else counted_after - counted,
        "wire_bytes": wire_after.bytes - wire.bytes if wire and wire_after else None,
        "packets": wire_after.packets - wire.packets if wire and wire_after else None,
    }


def _wire(interface: str | None) -> Wire | None:
    return None if interface is None else wire_sent(interface)


def trial(arguments: dict[str, Any], say: Say) -> bool:
    """Takes the steps of one method, to see whether it survives them."""
    method = Method(**arguments["method"])
    with process_group(arguments["timeout_s"]):
        contender = contenders([method])[0]
        pool = Pool(NUM_PARAMETERS, seed=dist.get_rank())
        for _ in range(method.warmup + 1):
            backward(contender, pool)
    return bool(torch.isfinite(next(contender.model.parameters()).grad.sum()))  # type: ignore[union-attr]
