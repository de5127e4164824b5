"""With k attack passes for each exchange, how much does compression still shorten a step?

    python benchmarks/passes.py [--links 10mbit 100mbit 1gbit] [--steps 5]

resnet9, batch 128 a host in bf16 on channels-last images, PGD-k training steps as `distrobust train` takes them, in two
hosts joined by a slow link, one torch thread each: dense fp32 and 1 % of the coordinates in 4 bits take turns step by
step, for k from 0 (natural training) to 20. A step is the slower host's, the figure a median over steps. Beside it what
the two would take if the exchange cost nothing: the same steps without a link, which bounds what any compression can
win. Needs the slow-link lab: root, or user namespaces.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import record
import torch
import torch.distributed as dist
from training_speed import build

from distrobust import config as configuration
from distrobust.bench import launch
from distrobust.bench.rank import process_group
from distrobust.comm.transport import Transport
from distrobust.lab import hosts as lab
from distrobust.lab.link import parse_link
from distrobust.optim.schedules import Schedule
from distrobust.train.checkpoint import Position
from distrobust.train.state import make_state
from distrobust.train.step import Recipe, train_step

WARM, PASSES, BATCH = 3, (0, 1, 2, 4, 7, 10, 20), 128
DENSE, OURS, ALONE = "dense", "1 %", "no exchange"


def measure(arguments: dict[str, Any], say: Any) -> dict[str, Any]:
    """In every host: seconds of each step, by k and way, and bytes sent a step."""
    with process_group():
        rank = dist.get_rank()
        generator = torch.Generator().manual_seed(rank)
        images = torch.randint(256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (BATCH,), generator=generator)
        found: dict[str, dict[str, list[float]]] = {}
        sent: dict[str, int] = {}
        for k in PASSES:
            ways = {name: _way(name, k) for name in (DENSE, OURS, ALONE)}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for step in range(WARM + arguments["steps"]):
                for name, (state, recipe) in ways.items():
                    before = state.compression.sent_bytes
                    dist.barrier()
                    result = train_step(state, images, labels, recipe, rank)
                    if step >= WARM:
                        seconds[name].append(result.step_s)
                        sent[name] = state.compression.sent_bytes - before
            found[str(k)] = seconds
        return {"seconds": found, "sent_bytes": sent}


class _Silent(Transport):
    """A group of one: nothing is sent."""

    def __init__(self) -> None:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        super().__init__(groups[dist.get_rank()])


def _way(name: str, k: int) -> tuple[Any, Recipe]:
    values = {
        "data": {"path": "none"},
        "train": {"precision": "bf16", "schedule": {"name": "constant", "peak": 0.01, "warmup": 0.0}},
        "attack": {"name": "pgd", "steps": k} if k else None,
        "compress": {"density": 0.01, "warmup": 0.0} if name == OURS else None,
    }
    config = configuration.parse(values, "benchmark")
    net = build("resnet9").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    transport = _Silent() if name == ALONE else Transport()
    position, num_steps, device = Position(1, "train", 0), 10**6, torch.device("cpu")
    state = make_state(net, position, config.train, config.compress, None, num_steps, transport, device)
    return state, Recipe(config.train, config.attack, Schedule("constant", 0.01), num_steps, 0, False, 0, True)


def row(link: str, ranks: list[dict[str, Any]], k: int) -> dict[str, Any]:
    median = {}
    for name in (DENSE, OURS, ALONE):
        each = zip(*(rank["seconds"][str(k)][name] for rank in ranks), strict=True)
        median[name] = statistics.median(max(step) for step in each)
    return {
        "link": link,
        "k": k,
        "step_s": median,
        "times_faster_than_dense": median[DENSE] / median[OURS],
        "at_most": median[DENSE] / median[ALONE],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", default=["10mbit", "100mbit", "1gbit"])
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    reason = lab.why_not()
    if reason is not None:
        sys.exit(reason)
    rows, sent = [], {}
    for link in arguments.links:
        with lab.lab(2, parse_link(link)) as hosts:
            ranks = launch.run(hosts, "passes:measure", {"steps": arguments.steps})
        sent = ranks[0]["sent_bytes"]
        for k in PASSES:
            rows.append(row(link, ranks, k))
            print(rows[-1], flush=True)
    content = {"setting": __doc__, "batch_per_host": BATCH, "sent_bytes_a_step": sent, "rows": rows}
    print(record.write("passes", (__doc__ or "").splitlines()[0], content))


if __name__ == "__main__":
    main()
