"""Does the exchange of early gradients run while later ones are still being computed?

    python benchmarks/overlap.py [--link 10mbit] [--steps 9]

A decoder-only transformer of 25 M parameters in two hosts joined by a slow link, real backward passes, 1 % of the
coordinates at 4 bits. Three ways take turns: no exchange at all (a hook that returns the bucket as it is), ours, and
ours made to wait for every bucket's exchange before the next gradient is computed. For one step of ours the record
holds a trace: when each bucket's message was handed to the link, the last one right after the last gradient, and when
the other host's had arrived. Needs the slow-link lab: root, or user namespaces.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from typing import Any

import record
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distrobust
from distrobust.bench import launch
from distrobust.bench.methods import floor
from distrobust.bench.rank import process_group
from distrobust.comm.transport import Transport
from distrobust.lab import hosts as lab
from distrobust.lab.link import parse_link

WIDTH, LAYERS, HEADS, LENGTH, BATCH, VOCABULARY = 512, 8, 8, 64, 4, 256
WARM = 8
NONE, OURS, WAITING = "no exchange", "ours", "ours, waiting for every exchange"


class Decoder(nn.Module):
    """(B, T) int64 -> mean cross-entropy of every next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1] - 1)
        logits = self.head(self.layers(self.embed(tokens[:, :-1]), mask=mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Traced(Transport):
    """Notes when each request was issued and when its answer was there; with `waits`, waits for it."""

    def __init__(self, waits: bool) -> None:
        super().__init__()
        self.waits = waits
        self.issued: list[float] = []
        self.arrived: list[float] = []

    def issue(self, request: Any) -> Any:
        arrived, number = self.arrived, len(self.issued)
        self.issued.append(time.perf_counter())
        arrived.append(0.0)

        def noted(done: Any) -> Any:
            arrived[number] = time.perf_counter()
            return done.value()

        future = super().issue(request).then(noted)
        if self.waits:
            future.wait()
        return future


def measure(arguments: dict[str, Any], say: Any) -> dict[str, Any]:
    """In every host: seconds of each backward by way, and the traces of `OURS`."""
    with process_group():
        ways = {name: _install(name) for name in (NONE, OURS, WAITING)}
        generator = torch.Generator().manual_seed(dist.get_rank())
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        traces = []
        for step in range(WARM + arguments["steps"]):
            for name, (model, transport) in ways.items():
                model.zero_grad(set_to_none=True)
                loss = model(torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator))
                if transport is not None:
                    transport.issued, transport.arrived = [], []
                dist.barrier()
                started = time.perf_counter()
                loss.backward()
                taken = time.perf_counter() - started
                if step >= WARM:
                    seconds[name].append(taken)
                    if name == OURS:
                        shifted = {key: [t - started for t in getattr(transport, key)] for key in ("issued", "arrived")}
                        traces.append({"seconds": taken, **shifted})
        return {"seconds": seconds, "traces": traces}


def _install(name: str) -> tuple[DistributedDataParallel, Traced | None]:
    torch.manual_seed(0)
    model = DistributedDataParallel(Decoder(), gradient_as_bucket_view=True, init_sync=False)
    if name == NONE:
        floor(model)
        return model, None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    compression = distrobust.compress(model, optimizer, density=0.01, warmup=0.0, values="4bit", exchange="all_gather")
    transport = Traced(waits=name == WAITING)
    compression.settings = dataclasses.replace(compression.settings, transport=transport)
    return model, transport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", default="10mbit")
    parser.add_argument("--steps", type=int, default=9)
    arguments = parser.parse_args()
    reason = lab.why_not()
    if reason is not None:
        sys.exit(reason)
    with lab.lab(2, parse_link(arguments.link)) as hosts:
        ranks = launch.run(hosts, "overlap:measure", {"steps": arguments.steps})
    medians = {
        name: statistics.median(max(each) for each in zip(*(rank["seconds"][name] for rank in ranks), strict=True))
        for name in (NONE, OURS, WAITING)
    }
    traces = sorted(ranks[0]["traces"], key=lambda trace: trace["seconds"])
    trace = traces[len(traces) // 2]
    for name, value in medians.items():
        print(f"{name:<34} {value:.3f} s")
    hidden = (medians[WAITING] - medians[OURS]) / (medians[WAITING] - medians[NONE])
    print(f"{100 * hidden:.0f} % of what the waiting hook adds to a backward pass is hidden behind it")
    print("one step of ours, ms since its backward began:")
    for number, (issued, arrived) in enumerate(zip(trace["issued"], trace["arrived"], strict=True)):
        print(f"  bucket {number}: sent {1e3 * issued:6.0f}, the other's here {1e3 * arrived:6.0f}")
    question = (__doc__ or "").splitlines()[0]
    content = {
        "setting": __doc__,
        "link": arguments.link,
        "median_s": medians,
        "hidden_share": hidden,
        "trace_of_a_median_step_s": trace,
    }
    print(record.write("overlap", question, content))


if __name__ == "__main__":
    main()
