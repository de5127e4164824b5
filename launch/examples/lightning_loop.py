"""Compressed training in Lightning, with checkpoints that hold what was not sent yet.

    python launch/examples/lightning_loop.py runs/lightning --epochs 4
    python launch/examples/lightning_loop.py runs/lightning --epochs 8     # continues from epoch 4

DDPStrategy takes the hook before Lightning has made the optimizers; the callback hands them over. Accumulation, bf16
and gradient clipping stay options of the Trainer. On GPUs change `accelerator`, nothing else.
"""

import argparse
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distrobust.comm.deferred import Deferred
from distrobust.comm.hook import compression_hook

EPOCHS, BATCH = 8, 32


class Compress(pl.Callback):
    """Starts compression before Lightning restores the optimizers; keeps every rank's residual in the checkpoint."""

    def __init__(self, deferred: Deferred) -> None:
        self.deferred = deferred

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of precision="16-mixed"
        self.deferred.start(trainer.strategy.model, trainer.optimizers, scaler=scaler)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = [None] * trainer.world_size if trainer.is_global_zero else None  # rank 0 writes the file
        dist.gather_object(self.deferred.state_dict(), states)
        checkpoint["compression"] = states

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.deferred.load_state_dict(checkpoint["compression"][trainer.global_rank])


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args(command_line)

    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    pl.seed_everything(0)
    deferred = Deferred(density=0.01, num_steps=EPOCHS * len(data) // (2 * BATCH))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(ddp_comm_state=deferred, ddp_comm_hook=compression_hook),
        callbacks=[Compress(deferred)],
        max_epochs=arguments.epochs,
        default_root_dir=arguments.folder,
        logger=False,
        enable_checkpointing=False,  # ModelCheckpoint works as well
        enable_progress_bar=False,
    )
    model, last = Digits(), arguments.folder / "last.ckpt"
    loader = DataLoader(data, BATCH, shuffle=True)
    trainer.fit(model, loader, ckpt_path=last if last.exists() else None, weights_only=True)
    trainer.save_checkpoint(last)
    torch.save(model.state_dict(), arguments.folder / f"model-{trainer.global_rank}.pt")
    if trainer.is_global_zero and (compression := deferred.compression) is not None:
        accuracy = (model.net(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
        fewer = compression.dense_bytes / compression.sent_bytes
        print(f"step {compression.step}: accuracy {accuracy:.3f}, {fewer:.1f} times fewer bytes than dense")


if __name__ == "__main__":
    main()
