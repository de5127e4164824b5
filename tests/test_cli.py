"""The command line: one line and exit code 2 for a mistake, never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distrobust import cli
from distrobust.train.modelfile import build_model, save_model_file


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
        (["evaluate", "nowhere.pt", "--data", "x", "--eps", "8"], "did you mean 8/255"),
        (["evaluate", "nowhere.pt"], "Missing option '--data'"),
        (["search", "launch/digits.yaml"], "search: wanted a pre-trained model"),
        (["search", "launch/digits.yaml", "--choices", "0,x"], "--choices: got '0,x', wanted numbers"),
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
    assert _run("evaluate", str(tmp_path / "model.pt"), *options, monkeypatch=monkeypatch) == 0
    assert torch.get_num_threads() == threads == 1
    clean, robust = capsys.readouterr().out.splitlines()
    assert "clean" in clean
    assert "n = 360" in clean
    for part in ("PGD-2 Linf 0.1", "n = 40", "seed 0", "95 % interval", "few samples"):
        assert part in robust


def test_python_dash_m_is_the_same_program() -> None:
    ran = subprocess.run([sys.executable, "-m", "distrobust", "--version"], capture_output=True, text=True)
    assert ran.stdout.startswith("distrobust, version ")
