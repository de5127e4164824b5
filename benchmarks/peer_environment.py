"""Packages of peers in an environment of their own, which shares this one's torch."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

import torch


def environment_of(folder: Path, packages: Sequence[str], *options: str) -> Path:
    """Its Python; the environment is made, and packages it lacks are installed. options: of pip install."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        own = next(iter(folder.glob("lib/python*/site-packages")))
        (own / "shared.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *options, *packages], check=True)
    return python
