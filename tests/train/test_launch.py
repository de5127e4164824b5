"""Between a person and torch's agent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from distrobust import config
from distrobust.train import launch
from distrobust.train.rundir import Outcome, RunDirectory

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SCRIPT = Path(__file__).parents[2] / "launch/torchrun"


def test_ctrl_c_asks_the_workers_and_waits_for_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch's agent would kill them after 30 s, also those that are done: they wait for it, and it has left."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    directory = RunDirectory(tmp_path)

    def agent(_config: Any, _work: Any) -> Any:
        def launched(_values: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            while not directory.stop.exists():
                time.sleep(0.01)
            time.sleep(0.1)  # the checkpoint
            directory.write_outcome(Outcome("stopped"))

        return launched

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", agent)
    values = {"data": {"path": "data"}, "run": {"dir": str(tmp_path)}, "cluster": {"workers": 2}}
    assert launch.spawn_torchrun(config.parse(values, "test")).status == "stopped"


def test_the_script_leaves_ranks_time_for_a_checkpoint_and_gives_others_an_address_that_is_not_loopback(
    tmp_path: Path,
) -> None:
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    (tmp_path / "launch").mkdir()
    shutil.copy(SCRIPT, tmp_path / "launch")
    (tools / "torchrun").write_text(f'#!/bin/sh\necho "${SHUTDOWN_TIMEOUT}" "$@"\n')
    (tools / "python").write_text(
        '#!/bin/sh\n[ "$*" = "-m distrobust.train.interface 127.0.1.1 3" ] && echo 10.0.0.7 true\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != SHUTDOWN_TIMEOUT}
    command = [str(tmp_path / "launch/torchrun"), "127.0.1.1", "3", "job.yaml"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.stdout.startswith("1800 "), ran.stderr
    assert "--local-addr 10.0.0.7 --rdzv-conf is_host=true " in ran.stdout
