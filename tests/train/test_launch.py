"""What torch's agent is told before it starts workers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distrobust import config
from distrobust.errors import CommError
from distrobust.train import launch

SCRIPT = Path(__file__).parents[2] / "launch/torchrun"


def test_ctrl_c_leaves_ranks_time_for_their_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """30 s are torch's own idea, and a step may take longer."""
    monkeypatch.delenv(launch.SHUTDOWN_TIMEOUT, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen: list[Any] = []
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda told, _: seen.append(told) or print)
    values = {"data": {"path": "data"}, "run": {"dir": str(tmp_path)}, "cluster": {"workers": 2}}
    try:
        with pytest.raises(CommError):
            launch.spawn_torchrun(config.parse(values, "test"))
    finally:
        os.environ.pop(launch.SHUTDOWN_TIMEOUT, None)
    assert getattr(seen[0], "shutdown_timeout", launch.SHUTDOWN_S) == launch.SHUTDOWN_S  # older torch has none


def test_the_script_says_so_too_and_gives_others_an_address_that_is_not_loopback(tmp_path: Path) -> None:
    tools = tmp_path / ".venv/bin"
    tools.mkdir(parents=True)
    (tmp_path / "launch").mkdir()
    shutil.copy(SCRIPT, tmp_path / "launch")
    (tools / "torchrun").write_text(f'#!/bin/sh\necho "${launch.SHUTDOWN_TIMEOUT}" "$@"\n')
    (tools / "python").write_text(
        '#!/bin/sh\n[ "$*" = "-m distrobust.train.interface 127.0.1.1 3" ] && echo 10.0.0.7 true\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != launch.SHUTDOWN_TIMEOUT}
    command = [str(tmp_path / "launch/torchrun"), "127.0.1.1", "3", "job.yaml"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.stdout.startswith(f"{launch.SHUTDOWN_S} "), ran.stderr
    assert "--local-addr 10.0.0.7 --rdzv-conf is_host=true " in ran.stdout
