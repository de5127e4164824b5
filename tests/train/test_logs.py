"""What a rank logs is kept with its rank, one JSON object a line; nothing of it stays behind in the process."""

import json
import logging
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distrobust.train import logs
from tests.harness.jobs import run_job
from tests.train.conftest import MakeConfig


def _lines(directory: Path, rank: int = 3) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"rank-{rank}.jsonl").read_text().splitlines()]


def test_every_line_says_who_when_how_bad_and_what(tmp_path: Path) -> None:
    with logs.kept(tmp_path, 3):
        logging.getLogger("distrobust.comm").info("density %s", 0.01)
        logging.getLogger("torch").warning("two\nlines, and \x00")
    ours, theirs = _lines(tmp_path)
    assert ours.keys() == {"time", "level", "rank", "host", "pid", "logger", "text"}
    assert (ours["rank"], ours["level"], ours["logger"]) == (3, "INFO", "distrobust.comm")
    assert ours["text"] == "density 0.01"
    assert (theirs["logger"], theirs["text"]) == ("torch", "two\nlines, and \x00")


def test_others_are_heard_from_warnings_on_and_details_of_ours_are_not(tmp_path: Path) -> None:
    with logs.kept(tmp_path, 3):
        logging.getLogger("ray").info("chatter")
        logging.getLogger("distrobust").debug("detail")
    assert _lines(tmp_path) == []


def test_what_ends_the_run_is_logged_with_its_traceback_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), logs.kept(tmp_path, 3):
        _ = 1 / 0
    [line] = _lines(tmp_path)
    assert line["level"] == "ERROR"
    assert line["text"] == "ended by ZeroDivisionError"
    assert "_ = 1 / 0" in line["trace"]


def test_a_restart_appends(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with logs.kept(tmp_path, 3):
            logging.getLogger("distrobust").info(text)
    assert [line["text"] for line in _lines(tmp_path)] == ["first", "second"]


def test_nothing_stays_behind_in_the_process(tmp_path: Path) -> None:
    root, ours = logging.getLogger(), logging.getLogger("distrobust")
    before = (list(root.handlers), ours.level)
    with logs.kept(tmp_path, 3):
        assert len(root.handlers) == len(before[0]) + 1  # pytest's are there: nothing of ours on standard error
    assert (root.handlers, ours.level) == before


def test_a_program_without_logging_shows_warnings_with_their_rank(tmp_path: Path) -> None:
    code = (
        "import logging, pathlib, sys; from distrobust.train import logs\n"
        "with logs.kept(pathlib.Path(sys.argv[1]), 3):\n"
        "    logging.getLogger('distrobust').info('quiet'); logging.getLogger('distrobust').warning('loud')\n"
        "    sys.exit('told by others')"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ran.stderr == "rank 3: loud\ntold by others\n"
    assert [line["text"] for line in _lines(tmp_path)] == ["quiet", "loud", "ended by SystemExit"]


def test_a_run_leaves_its_log_and_nothing_that_was_not_asked_for(make_config: MakeConfig) -> None:
    config = make_config()
    run_job(config)
    texts = [line["text"] for line in _lines(config.run.dir / "logs", 0)]
    assert "train from step 0 of 8, 1 ranks" in texts
    left = {path.name for path in config.run.dir.iterdir()}
    assert left == {"config.yaml", "metrics.jsonl", "outcome.json", "logs", "stacks", "checkpoints", "models"}


def test_a_port_that_is_taken_is_in_the_log_of_its_rank(make_config: MakeConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = make_config(f"metrics.port={port}", "pretrain=null", "train.epochs=1")
        run_job(config)
    texts = [line["text"] for line in _lines(config.run.dir / "logs", 0) if line["level"] == "WARNING"]
    assert any(text.startswith(f"metrics port {port} is not available") for text in texts)
