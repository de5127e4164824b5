"""The command line: one line and exit code 2 for a mistake, never a traceback."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from distrobust import cli
from distrobust.adversarial.threat import Norm
from distrobust.cli import jobs
from distrobust.evaluation.suite import Name
from distrobust.train import launch
from distrobust.train.modelfile import build_model, save_model_file
from distrobust.train.rundir import Outcome, RunDirectory


def _run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["distrobust", *arguments])
    try:
        cli.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["config", "launch/digits.yaml", "--set", "compress.densty=1"], "did you mean 'density'"),
        (["report", "nowhere"], "nowhere"),
        (["evaluate", "nowhere.pt", "--data", "x"], "no such file"),
        (["evaluate", "nowhere.pt", "--data", "x", "--eps", "8"], "write 8/255"),
        (["evaluate", "nowhere.pt", "--data", "x", "--eps", "1e400"], "eps: got '1e400', wanted a number"),
        (["evaluate", "nowhere.pt", "--data", "x", "--eps", "nan"], "eps: got 'nan', wanted a number"),
        (["evaluate", "nowhere.pt", "--data", "x", "--norm", "l3"], "threat.norm: 'l3'"),
        (["evaluate", "nowhere.pt", "--data", "x", "--attacks", "pgd,autoatack"], "did you mean 'autoattack'"),
        (["evaluate", "nowhere.pt", "--data", "x", "--attacks", "transfer"], "give it with --source"),
        (["evaluate", "nowhere.pt", "--data", "x", "--plot", "x.gif"], "ends in .png, .svg or .pdf"),
        (["evaluate", "nowhere.pt", "--data", "x", "--json", "no/where.json"], "create it first"),
        (["evaluate", "nowhere.pt"], "Missing option '--data'"),
        (["search", "launch/digits.yaml"], "search: wanted a pre-trained model"),
        (["search", "launch/digits.yaml", "--choices", "0,x"], "--choices: got '0,x', wanted numbers"),
        (["k8s", "render", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["k8s", "render", "launch/digits.yaml", "--overlay", "tpu"], "got 'tpu', wanted one of cpu, gpu, kueue"),
        (["k8s", "render", "launch/digits.yaml", "--set", "kubernetes.memry=1Gi"], "did you mean 'memory'"),
        (["k8s", "write", "elsewhere/k8s"], "launch/digits.yaml"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert _run(*arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("distrobust: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["data"], ["k8s"]], ids=str)
def test_without_a_command_the_help_is_printed_as_it_is(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(*arguments, "--help", monkeypatch=monkeypatch)
    asked = capsys.readouterr().out
    _run(*arguments, monkeypatch=monkeypatch)
    found = capsys.readouterr()
    assert asked.count("\n") > 5
    assert found.out + found.err == asked


def test_config_prints_what_train_will_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert _run("config", "launch/digits.yaml", "--set", "compress.fewer_bytes=50", monkeypatch=monkeypatch) == 0
    assert "fewer_bytes: 50.0" in capsys.readouterr().out


def test_evaluate_prints_attack_budget_seed_count_interval_and_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from distrobust import data

    source = data.describe(data.write_digits(tmp_path / "digits"), "test")
    save_model_file(tmp_path / "model.pt", build_model("cnn", source, 0), "cnn", source)
    threads = torch.get_num_threads()
    options = ["--data", str(tmp_path / "digits"), "--eps", "0.1", "--steps", "2", "--images", "40", "--threads", "1"]
    options += ["--restarts", "3", "--curve-eps", "0.05,0.1"]
    options += ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    assert _run("evaluate", str(tmp_path / "model.pt"), *options, monkeypatch=monkeypatch) == 0
    assert torch.get_num_threads() == threads == 1
    lines = capsys.readouterr().out.splitlines()
    numbers = [line for line in lines if " %" in line]
    attacks = ["clean", "PGD-2 x 3 Linf 0.1", "PGD-2 x 3 Linf 0.05"]
    attacks += ["PGD-2 Linf 0.1", "PGD-10 x 3 Linf 0.1", "PGD-2 Linf 0.5"]  # known of the first; two checks
    for line, attack in zip(numbers, attacks, strict=False):
        assert line.startswith(attack)
    assert numbers[-1].startswith("Expected robustness over Linf 0 .. 0.1 (PGD-2): ")
    for line in numbers:
        for part in ("n = 40", "seed 0", "95 % interval", "flags: few samples"):
            assert part in line
    per_class_of_pgd = "Per class, PGD-2 x 3 Linf 0.1, seed 0, flags: few samples"
    (per_class,) = [line for line in lines if line.startswith(per_class_of_pgd)]
    assert re.search(r": 0 \d+/\d+, 1 \d+/\d+", per_class)
    assert any(line.startswith("Flag: few samples: 40, fewer than 1000") for line in lines)
    assert any(line.startswith("      do: evaluate more images") for line in lines)
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["settings"]["seed"] == 0
    assert written["results"][1]["score"]["samples"] == 40
    assert written == json.loads((tmp_path / "model.evaluation/evaluation.json").read_text())
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_help_names_every_norm_and_attack(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("evaluate", "--help", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    names = {*get_args(Norm), *get_args(Name)} - {"transfer"}  # that one is --source
    assert [name for name in names if name not in text] == []


def test_plots_without_matplotlib_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert _run("evaluate", "nowhere.pt", "--data", "x", "--plot", "a.svg", monkeypatch=monkeypatch) == 2
    assert "pip install 'distrobust[plots]'" in capsys.readouterr().err


def test_python_dash_m_is_the_same_program() -> None:
    ran = subprocess.run([sys.executable, "-m", "distrobust", "--version"], capture_output=True, text=True)
    assert ran.stdout.startswith("distrobust, version ")


@pytest.mark.parametrize(("restarts", "status", "code"), [("0", "stopped", 0), ("1", "stopped", 0), ("1", "failed", 2)])
def test_torchrun_is_told_of_no_failure_that_a_restart_could_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, restarts: str, status: str, code: int
) -> None:
    """A run that was stopped leaves with 0; what ended an earlier start of the same torchrun still stands."""
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in {**given, "TORCHELASTIC_RESTART_COUNT": restarts}.items():
        monkeypatch.setenv(name, value)
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.stop.touch()
    directory.write_outcome(Outcome(status, "ConfigError" if status == "failed" else ""))
    found: list[tuple[bool, Outcome | None]] = []

    def run(*_: Any) -> Outcome:
        found.append((directory.stop.exists(), directory.outcome()))
        return Outcome(status, "ConfigError" if status == "failed" else "", "step 3; a checkpoint was written")

    monkeypatch.setattr(launch, "run_under_torchrun", run)
    monkeypatch.setattr(jobs, "_report", lambda _: None)
    job = tmp_path / "job.yaml"
    job.write_text(f"data: {{path: x}}\nrun: {{dir: {directory.path}}}\n")
    assert _run("train", str(job), monkeypatch=monkeypatch) == code
    is_first = restarts == "0"
    assert [(stop, outcome is None) for stop, outcome in found] == [(not is_first, is_first)]
