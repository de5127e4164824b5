"""Compressed data-parallel training in a loop of your own, under torchrun.

    torchrun --nproc-per-node 2 launch/examples/plain_loop.py runs/plain --stop-after 60
    torchrun --nproc-per-node 2 launch/examples/plain_loop.py runs/plain     # continues from step 60

The second ends with the bits of a run that never stopped. Digits of scikit-learn, two layers, CPU; on GPUs move model
and batches to the device and use nccl.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distrobust

STEPS, BATCH = 120, 32


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stop-after", type=int, default=STEPS, metavar="STEP")
    arguments = parser.parse_args(command_line)
    arguments.folder.mkdir(parents=True, exist_ok=True)

    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    compression = distrobust.compress(model, optimizer, density=0.01, num_steps=STEPS)  # the only line that is ours

    # A file for each rank, since what was not sent yet is each rank's own. The optimizer is loaded after compress().
    checkpoint = arguments.folder / f"rank-{rank}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        compression.load_state_dict(saved["compression"])

    for step in range(compression.step, arguments.stop_after):
        seed = step * num_ranks + rank
        chosen = torch.randint(len(images), (BATCH,), generator=torch.Generator().manual_seed(seed))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "compression": compression.state_dict()}
    torch.save(state, checkpoint)
    if rank == 0:
        accuracy = (net(images).argmax(1) == labels).float().mean()
        fewer = compression.dense_bytes / compression.sent_bytes
        print(f"step {compression.step}: accuracy {accuracy:.3f}, {fewer:.1f} times fewer bytes than dense")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
