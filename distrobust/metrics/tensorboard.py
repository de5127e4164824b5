"""Records for TensorBoard: `tensorboard --logdir RUN/tensorboard`. Needs `pip install 'distrobust[tensorboard]'`.

A phase is one of TensorBoard's runs, so that each begins at step 0. Where a run continues from a checkpoint, the steps
that are taken again replace those of before.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrobust.errors import ConfigError
from distrobust.metrics.scalars import scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_S = 15
"""Seconds until what was written is in the file, at most."""


def require() -> None:
    """ConfigError, with what to do, unless TensorBoard is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "metrics.tensorboard: got true, but tensorboard is not installed; pip install 'distrobust[tensorboard]', "
            "or set it to false"
        )


class TensorBoard:
    """One writer of event files for each phase, and one for the evaluation at the end, below `directory`."""

    def __init__(self, directory: Path) -> None:
        require()
        self._directory = directory
        self._writers: dict[str, SummaryWriter] = {}
        self._resumed: tuple[object, int] = (None, 0)

    def write(self, record: Mapping[str, Any]) -> None:
        if record.get("event") == "run":
            self._resumed = (record.get("resumed_phase"), int(record.get("resumed_step") or 0))
            text = json.dumps(record.get("config"), indent=2, default=str)
            self._writer("run").add_text("config", f"```\n{text}\n```")
        for name, value in scalars(record).items():
            writer = self._writer(str(record.get("phase") or record["event"]))
            step = int(record.get("step") or 0)
            writer.add_scalar(name, value, step, walltime=record.get("time"))

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, name: str) -> SummaryWriter:
        if name not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            phase, step = self._resumed
            first_again = step + 1 if phase == name else None
            self._writers[name] = SummaryWriter(self._directory / name, purge_step=first_again, flush_secs=FLUSH_S)
        return self._writers[name]
