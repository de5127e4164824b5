"""What does compression cost a language model? Perplexity of a small LSTM on characters, dense against 1 % and 0.1 %.

    python benchmarks/language.py --text FILE [--seeds 0 1 2] [--steps 1500]

One layer of 256 units, SGD with momentum and clipping per tensor as in Deep Gradient Compression's language experiment,
four workers inside one process (workers.py), global batch 32 of 64 characters. The last tenth of the text is held out.
Bytes are those of the whole run, warm-up and last step included, counted at the transport.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import record
import torch
from gpt import Text, loss_of
from torch import Tensor, nn
from workers import Workers

from distrobust.compression.memory import Rule
from distrobust.optim.schedules import Schedule

NUM_WORKERS, BATCH, LENGTH, PEAK, CLIP = 4, 32, 64, 1.0, 0.5
AHEAD: dict[str, Any] = {"step_ahead": True, "values": "4bit", "final_steps": 1, "final_density": 0.5}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "DGC 1 %, warm-up, fp16": {"density": 0.01, "warmup": 0.2},
    "DGC 0.1 %, warm-up, fp16": {"density": 0.001, "warmup": 0.2},
    "step-ahead 1 %, 4 bit": {"density": 0.01, **AHEAD},
    "step-ahead 0.1 %, 4 bit": {"density": 0.001, **AHEAD},
}


class Characters(nn.Module):
    """(B, T) int64 -> (B, T, vocabulary) logits."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 64)
        self.lstm = nn.LSTM(64, 256, batch_first=True)
        self.head = nn.Linear(256, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embed(x))[0])
        return logits


def train(text: Text, seed: int, num_steps: int, options: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = Characters(text.vocabulary)
    rule = Rule(momentum=0.9, masking=not options.get("step_ahead", False), clip=CLIP)
    workers = Workers(net, NUM_WORKERS, num_steps, rule, **options)
    schedule = Schedule("one_cycle", PEAK, 0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_steps):
        rows = text.rows(BATCH, generator)

        def backward(rank: int, rows: Tensor = rows) -> None:
            loss_of(net, rows[rank::NUM_WORKERS]).backward()

        workers.step(backward, schedule.at(step / num_steps))
    with torch.no_grad():
        whole = (len(text.held_out) - 1) // LENGTH * LENGTH
        rows = torch.stack([text.held_out[s : s + LENGTH + 1] for s in range(0, whole, LENGTH)])
        perplexity = math.exp(sum(float(loss_of(net, r)) * len(r) for r in rows.split(256)) / len(rows))
    return {"seed": seed, "perplexity": perplexity, **workers.bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = Text(arguments.text, LENGTH)
    rows = []
    for name, options in VARIANTS.items():
        if arguments.only not in name:
            continue
        runs = [train(text, seed, arguments.steps, options) for seed in arguments.seeds]
        fewer = runs[0]["dense_bytes"] / runs[0]["sent_bytes"]
        interval = record.interval([run["perplexity"] for run in runs])
        rows.append({"name": name, "options": options, "perplexity": interval, "fewer_bytes": fewer, "runs": runs})
        print(
            f"{name:<26} perplexity {interval['mean']:.3f} {interval['values']}, {fewer:.1f} times fewer bytes",
            flush=True,
        )
    if not arguments.only:
        content = {"setting": __doc__, "steps": arguments.steps, "workers": NUM_WORKERS, "rows": rows}
        print(record.write("language", "What does compression cost a language model?", content))


if __name__ == "__main__":
    main()
