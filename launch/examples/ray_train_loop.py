"""Compressed training under Ray Train, with a worker function of your own.

    python launch/examples/ray_train_loop.py runs/ray

Each worker adds its part to Ray's checkpoint. When one dies, Ray restarts all of them and they continue from there,
to the same bits. The job of `distrobust train` is the long version of this file.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from sklearn.datasets import load_digits
from torch import nn

import distrobust

STEPS, BATCH = 120, 32


def train_loop(config: dict[str, Any]) -> None:
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    model = ray.train.torch.prepare_model(net)  # DistributedDataParallel, for two workers or more
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    compression = distrobust.compress(model, optimizer, density=0.01, num_steps=STEPS)

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder, f"rank-{rank}.pt"), weights_only=True)
        net.load_state_dict(saved["model"])
        compression.load_state_dict(saved["compression"])

    for step in range(compression.step, STEPS):
        seed = step * num_ranks + rank
        chosen = torch.randint(len(images), (BATCH,), generator=torch.Generator().manual_seed(seed))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % config["checkpoint_every"] == 0:
            metrics = {
                "step": compression.step,
                "accuracy": (net(images).argmax(1) == labels).float().mean().item(),
                "times_fewer_bytes": compression.dense_bytes / compression.sent_bytes,
            }
            with tempfile.TemporaryDirectory() as folder:
                state = {"model": net.state_dict(), "compression": compression.state_dict()}
                torch.save(state, Path(folder, f"rank-{rank}.pt"))
                ray.train.report(metrics, checkpoint=Checkpoint(folder))


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(command_line)
    storage = str(arguments.folder.resolve())
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={"checkpoint_every": STEPS // 3},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=1)),
    )
    print(trainer.fit().metrics)


if __name__ == "__main__":
    main()
