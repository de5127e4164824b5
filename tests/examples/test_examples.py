"""Every file of launch/examples runs as a user runs it, on real processes, and keeps its promises."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "launch/examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SEVERAL = str(Path(__file__).with_name("several.py"))


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Its output; fails the test if the command does. One thread each: two processes on perhaps two cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def accuracy_and_times_fewer_bytes(output: str) -> list[tuple[float, float]]:
    """Of every run that `output` reports."""
    found = re.findall(r"step \d+: accuracy ([\d.]+), ([\d.]+) times fewer bytes than dense", output)
    return [(float(accuracy), float(times)) for accuracy, times in found]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of the plain loop: A uninterrupted, B stopped after 50 steps and continued."""
    folder = tmp_path_factory.mktemp("plain")
    script = str(EXAMPLES / "plain_loop.py")
    return folder, run([*TORCHRUN, SEVERAL, script, "A", "B --stop-after 50", "B"], folder)


@pytest.mark.procs
@pytest.mark.timeout(240)
def test_the_plain_loop_learns_with_fewer_bytes_and_a_resumed_run_ends_with_the_same_bits(
    plain: tuple[Path, str],
) -> None:
    folder, output = plain
    whole, _, resumed = accuracy_and_times_fewer_bytes(output)
    assert whole == resumed
    assert whole[0] > 0.8
    assert whole[1] > 20
    first, *others = (torch.load(folder / run / f"rank-{rank}.pt") for run in "AB" for rank in (0, 1))
    assert all(same(first["model"], other["model"]) for other in others)
    ours, theirs = first["compression"]["residuals"], others[1]["compression"]["residuals"]  # rank 0 of A and B
    assert all(same({"v": ours[name]["v"]}, {"v": theirs[name]["v"]}) for name in ours)


@pytest.mark.procs
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["lightning_loop.py", "accelerate_loop.py"])
def test_a_trainers_example_learns_with_fewer_bytes_and_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Both run under torchrun; Lightning's own launcher only sets the same variables."""
    runs = ["A --epochs 4", "B --epochs 2", "B --epochs 4"]
    output = run([*TORCHRUN, SEVERAL, str(EXAMPLES / name), *runs], tmp_path)
    whole, half, resumed = accuracy_and_times_fewer_bytes(output)
    assert whole == resumed != half
    assert whole[0] > 0.8
    assert whole[1] > 20
    first, *others = (torch.load(tmp_path / run / f"model-{rank}.pt") for run in "AB" for rank in (0, 1))
    assert all(same(first, other) for other in others)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_ray_example_survives_a_dead_worker_and_ends_with_the_bits_of_the_plain_loop(
    plain: tuple[Path, str], tmp_path: Path
) -> None:
    """The two files train the same network on the same batches: only who starts the processes differs."""
    folder = tmp_path / "ray"
    script = str(Path(__file__).with_name("ray_twice.py"))
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    output = run(
        [sys.executable, script, str(folder)], tmp_path, PYTHONPATH=path, RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5"
    )
    assert "'step': 120" in output
    assert (folder / "gone").exists()
    whole = torch.load(plain[0] / "A/rank-0.pt")["model"]
    for rank in (0, 1):
        last = max(folder.rglob(f"rank-{rank}.pt"), key=lambda file: file.stat().st_mtime)
        saved = torch.load(last)
        assert saved["compression"]["step"] == 120
        assert same(saved["model"], whole)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_to_start_it(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text is not None
    assert f"launch/examples/{path.name}" in text
