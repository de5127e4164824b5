"""Records for Weights & Biases, kept in RUN/wandb; `wandb sync RUN/wandb/offline-run-*` sends them, if you want that.

Needs `pip install 'distrobust[wandb]'`. Always offline, whatever wandb's environment variables say: training waits for
no server, and no key is asked for. Neither code, git, the console nor the machine's state is recorded. Each start of a
run is one of theirs, all in a group of the run's name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrobust.errors import ConfigError
from distrobust.metrics.scalars import scalars


def require(project: str) -> None:
    """ConfigError, with what to do, unless wandb is installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"metrics.wandb: got {project}, but wandb is not installed; pip install 'distrobust[wandb]', or set it to "
            "null"
        )


class WeightsAndBiases:
    """A run of `project`, in `directory`/wandb. Curves of a phase are drawn over the phase's steps."""

    def __init__(self, project: str, directory: Path) -> None:
        require(project)
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            silent=True,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        name = directory.name
        try:
            self._run: Any = wandb.init(
                mode="offline", project=project, name=name, group=name, dir=directory, settings=settings
            )
        except (wandb.Error, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"metrics.wandb: wandb cannot be started ({reason}); set it to null") from error

    def write(self, record: Mapping[str, Any]) -> None:
        event = record.get("event")
        if event == "run":
            self._run.config.update(record.get("config") or {})
        elif event == "phase":
            phase = record["phase"]
            self._run.define_metric(f"{phase}/step", hidden=True)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        found = scalars(record)
        if event == "evaluation":
            self._run.summary.update(found)
        elif found:
            phase = record["phase"]
            values = {f"{phase}/{name}": value for name, value in found.items()}
            self._run.log({f"{phase}/step": int(record.get("step") or 0), **values})

    def close(self) -> None:
        """Ends the run and wandb's own process. A second call does nothing."""
        if self._run is None:
            return
        import wandb

        self._run.finish()
        self._run = None
        wandb.teardown()
