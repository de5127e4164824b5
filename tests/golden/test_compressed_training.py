"""A small compressed run, compared to the bit with the one that was recorded.

Every operation of it is element-wise IEEE arithmetic, and rate, momentum, decay and loss factors are powers of two, so
that a fused multiply-add rounds like a multiplication and an addition: any machine must find the same bits. The sum
over two ranks has one addition. A change that moves these numbers changes what users train; if that is meant, say so
and rewrite the record:

    DISTROBUST_REWRITE_GOLDEN=1 python -m pytest tests/golden
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import worker
from torch import Tensor, nn

RECORD = Path(__file__).with_name("compressed_training.json")
STEPS = 40


class Springs(nn.Module):
    """Each coordinate is pulled to a target that is another on every rank: loss = sum (w - target)^2 / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.zeros(80, 60)), nn.Parameter(torch.zeros(50))

    def forward(self, matrix: Tensor, vector: Tensor) -> Tensor:
        return 0.5 * ((self.matrix - matrix).square().sum() + (self.vector - vector).square().sum())


def targets(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Whole numbers from a linear congruence: no generator of any library is asked."""
    i = torch.arange(80 * 60 + 50)
    numbers = ((i * 7919 + step * 104_729 + rank * 1_299_709) * 15_485_863 % 2_147_483_647 % 201 - 100).float() / 3
    return numbers[:4800].view(80, 60), numbers[4800:]


def run() -> list[dict[str, Any]]:
    def body(rank: Rank) -> list[dict[str, Any]]:
        sgd = {"lr": 0.0625, "momentum": 0.5, "nesterov": True, "weight_decay": 2.0**-6}
        options = {"values": "fp16", "num_steps": STEPS, "ladder": (1.0, 0.25, 0.125)}
        ours = worker(rank, Springs, density=0.03125, sgd=sgd, **options)
        history = []
        for step in range(STEPS):
            ours.optimizer.zero_grad()
            ours.ddp(*targets(step, rank.rank)).backward()
            ours.optimizer.step()
            matrix = ours.ddp.module.matrix.detach()
            residual = ours.state.residuals["matrix"]
            history.append(
                {
                    "step": step,
                    "density": ours.state.density_at(step),
                    "sent_bytes": ours.state.sent_bytes,
                    "first": [float(value).hex() for value in matrix.view(-1)[:3]],
                    "parameters": digest(*ours.parameters().values()),
                    "residual": digest(residual.u, residual.v),
                }
            )
        return history

    return run_ranks(2, body)[0]


def digest(*tensors: Tensor) -> str:
    joined = torch.cat([tensor.reshape(-1) for tensor in tensors]) + 0.0  # -0 and 0 are the same number
    return hashlib.sha256(joined.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.ranks
def test_the_recorded_run_is_reproduced_to_the_bit() -> None:
    history = run()
    if os.environ.get("DISTROBUST_REWRITE_GOLDEN") == "1":
        RECORD.write_text("[\n" + ",\n".join(f"  {json.dumps(step)}" for step in history) + "\n]\n")
    recorded = json.loads(RECORD.read_text())
    for now, then in zip(history, recorded, strict=True):
        assert now == then
    assert {then["density"] for then in recorded} == {1.0, 0.25, 0.125, 0.03125}
