"""Compressed training with Accelerate: prepare() wraps model and optimizer, compress() takes both as they come.

    torchrun --nproc-per-node 2 launch/examples/accelerate_loop.py runs/accelerate --epochs 4
    torchrun --nproc-per-node 2 launch/examples/accelerate_loop.py runs/accelerate --epochs 8     # continues

Two batches are accumulated for each step: only the second one is exchanged. `accelerate launch` works as well.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distrobust

EPOCHS, BATCH = 8, 32


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args(command_line)

    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    seedable = DataLoaderConfiguration(use_seedable_sampler=True)  # so that a resumed run sees the same batches
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=seedable)
    model, optimizer, loader = accelerator.prepare(
        net,
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
        DataLoader(data, BATCH // 2, shuffle=True),
    )
    compression = distrobust.compress(model, optimizer, density=0.01, num_steps=EPOCHS * len(loader) // 2)

    # Accelerate saves once for all ranks; what was not sent yet is each rank's own.
    saved, ours = arguments.folder / "state", arguments.folder / f"compression-{accelerator.process_index}.pt"
    if ours.exists():
        accelerator.load_state(saved)
        compression.load_state_dict(torch.load(ours, weights_only=True))

    for epoch in range(compression.step * 2 // len(loader), arguments.epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

    accelerator.save_state(saved)
    torch.save(compression.state_dict(), ours)
    torch.save(net.state_dict(), arguments.folder / f"model-{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        accuracy = (net(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
        fewer = compression.dense_bytes / compression.sent_bytes
        print(f"step {compression.step}: accuracy {accuracy:.3f}, {fewer:.1f} times fewer bytes than dense")
    accelerator.end_training()


if __name__ == "__main__":
    main()
