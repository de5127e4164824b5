"""Evaluations of files: shared out, interrupted, continued, refused."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distrobust import data
from distrobust.adversarial.threat import Threat
from distrobust.errors import CheckpointError, CommError, ConfigError, ModelError
from distrobust.evaluation.suite import Suite
from distrobust.evaluation.trial import Verdict
from distrobust.train import evaluation, evaluation_ranks
from distrobust.train.evaluation import Job, Opened, record, run_rank
from distrobust.train.evaluation_ranks import evaluate
from distrobust.train.modelfile import build_model, save_model_file
from distrobust.train.verdicts import VerdictDirectory
from tests.train.conftest import with_other_labels

SUITE = Suite(Threat("linf", 0.1), ("pgd", "curve"), steps=2, curve=(0.05, 0.1, 0.2), checks=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits/, a network trained for twenty steps, a.pt, and one that was not, b.pt."""
    directory = tmp_path_factory.mktemp("files")
    source = data.describe(data.write_digits(directory / "digits"), "train")
    for seed, name in enumerate(("a", "b")):
        net = build_model("cnn", source, seed)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for x, y in data.Shard(source, 0, 1, seed=0).batches(0, 64) if name == "a" else ():
            optimizer.zero_grad()
            F.cross_entropy(net(x / 255.0), y).backward()
            optimizer.step()
        save_model_file(directory / f"{name}.pt", net, "cnn", source)
    return directory


@pytest.fixture
def job(files: Path, tmp_path: Path) -> Job:
    return Job(files / "a.pt", files / "digits", SUITE, tmp_path / "out", images=35, batch=10, seed=1, threads=1)


def said(content: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    """What must not depend on who did the work: everything but the seconds."""
    assert content is not None
    return [
        (r["score"]["attack"], r["score"]["class_correct"], r["score"]["class_samples"], r["forward_images"])
        for r in content["results"]
    ]


def count_attempts(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[tuple[str, int]]:
    """(trial's key, batch) of every attempt from now on; the `fail_at`-th raises KeyboardInterrupt."""
    seen: list[tuple[str, int]] = []
    original = evaluation.attempt

    def attempt(trial: Any, *arguments: Any, index: int, **options: Any) -> Verdict:
        if len(seen) == fail_at:
            raise KeyboardInterrupt
        seen.append((trial.key, index))
        return original(trial, *arguments, index=index, **options)

    monkeypatch.setattr(evaluation, "attempt", attempt)
    return seen


def test_the_columns_are_those_the_model_learned_from_where_there_are_such(job: Job, tmp_path: Path) -> None:
    other = with_other_labels(job.data, tmp_path / "data")
    source = data.describe(other, "train", image_column="picture", label_column="coarse")
    save_model_file(tmp_path / "c.pt", build_model("cnn", source, 0), "cnn", source)
    read = Opened(replace(job, checkpoint=tmp_path / "c.pt", data=other)).data
    assert (read.column, read.label_column) == ("picture", "coarse")
    assert len(set(read.labels.tolist())) == 10
    read = Opened(replace(job, checkpoint=tmp_path / "c.pt")).data
    assert (read.column, read.label_column) == ("image", "label")


def test_three_ranks_in_any_order_say_what_one_says(job: Job, tmp_path: Path) -> None:
    whole = evaluate(job)
    opened = Opened(replace(job, out=tmp_path / "shared"))
    opened.directory.open(opened.settings())
    for rank in (1, 2, 0):
        run_rank(opened, rank, 3)
    assert said(record(opened)) == said(whole)
    assert len(list((tmp_path / "shared").glob("verdicts-*.jsonl"))) == 3
    assert whole is not None
    assert json.loads((job.out / "evaluation.json").read_text()) == json.loads(json.dumps(whole))
    assert [r["score"]["samples"] for r in whole["results"]] == [35] * 5


def test_the_images_are_those_spaced_evenly(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    numbers: list[tuple[int, int]] = []
    original = evaluation.attempt

    def attempt(trial: Any, net: Any, x: torch.Tensor, y: torch.Tensor, **options: Any) -> Verdict:
        if trial.kind == "clean":
            seen.append(y)
            numbers.append((options["index"], options["first"]))
        return original(trial, net, x, y, **options)

    monkeypatch.setattr(evaluation, "attempt", attempt)
    opened = Opened(job)
    opened.directory.open(opened.settings())
    run_rank(opened, 0, 1)
    assert [len(y) for y in seen] == [10, 10, 10, 5]
    assert numbers == [(0, 0), (1, 10), (2, 20), (3, 30)]
    assert torch.cat(seen).tolist() == opened.labels.tolist()


def test_an_interrupted_evaluation_continues_where_it_was(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(replace(job, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        first = count_attempts(patch, fail_at=7)
        with pytest.raises(KeyboardInterrupt):
            evaluate(job)
    with (job.out / "verdicts-0000.jsonl").open("a") as file:
        file.write('{"trial":"clean-half-wri')  # as a power failure leaves it
    with monkeypatch.context() as patch:
        second = count_attempts(patch)
        assert said(evaluate(job)) == said(whole)
        assert len(first) == 7
        assert not set(first) & set(second)
        assert len(first) + len(second) == 6 * 4  # trials times batches
        evaluate(job)
        assert len(first) + len(second) == 24, "what is complete is not done again"


def test_another_number_of_ranks_continues(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(replace(job, out=tmp_path / "whole"))
    opened = Opened(job)
    opened.directory.open(opened.settings())
    run_rank(opened, 2, 3)
    seen = count_attempts(monkeypatch)
    assert said(evaluate(job)) == said(whole)
    assert {batch for _, batch in seen} == {0, 1, 3}


def test_more_attacks_do_only_those(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(job)
    seen = count_attempts(monkeypatch)
    evaluate(replace(job, suite=replace(SUITE, curve=(0.05, 0.1, 0.2, 0.3))))
    assert len(seen) == 4


def test_lines_that_are_no_verdicts_are_done_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(job)
    path = job.out / "verdicts-0000.jsonl"
    lines = path.read_text().splitlines()
    damaged = [json.loads(line) for line in lines[:4]]
    damaged[0]["verdict"]["right"] = "11x1"
    damaged[1]["verdict"] = [1, 2]
    damaged[2]["batch"] = "2"
    damaged[3]["verdict"]["unknown"] = 1
    path.write_text("\n".join([*(json.dumps(line) for line in damaged), *lines[4:]]) + "\n")
    seen = count_attempts(monkeypatch)
    assert said(evaluate(job)) == said(whole)
    assert len(seen) == 4


def retrained(job: Job) -> Job:
    path = job.out.parent / "c.pt"
    path.write_bytes((job.checkpoint.parent / "b.pt").read_bytes())
    return replace(job, checkpoint=path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda job: replace(job, seed=2), "seed: it has 1, this one 2"),
        (lambda job: replace(job, images=30), "images: it has 35, this one 30"),
        (lambda job: replace(job, batch=5), "batch: it has 10, this one 5"),
        (lambda job: replace(job, source=job.checkpoint), "source: it has None, this one "),
        (retrained, "checkpoint: it has "),
    ],
)
def test_another_evaluations_directory_is_refused(job: Job, change: Callable[[Job], Job], name: str) -> None:
    opened = Opened(job)
    opened.directory.open(opened.settings())
    with pytest.raises(CheckpointError, match=f"out belongs to another evaluation .{name}.* --out"):
        evaluate(change(job))


def test_two_starts_at_once_are_refused(job: Job) -> None:
    opened = Opened(job)
    opened.directory.open(opened.settings())
    with opened.directory.writer(0), pytest.raises(CheckpointError, match="in use by another evaluation"):
        evaluate(job)


def test_damaged_settings_are_one_clear_error(job: Job) -> None:
    job.out.mkdir()
    (job.out / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"settings\.json: not JSON .*; delete"):
        evaluate(job)


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch hacked",)


def test_missing_hostile_and_foreign_model_files_are_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "hostile.pt"
    torch.save({"model": "cnn", "classes": [], "shape": [], "state": Malicious()}, hostile)
    pickled = tmp_path / "pickled.pt"
    pickled.write_bytes(pickle.dumps(Malicious()))
    for path, message in (
        (tmp_path / "nowhere.pt", "no such file"),
        (hostile, "not a model file"),
        (pickled, "not a model file"),
    ):
        for bad in (replace(job, checkpoint=path), replace(job, source=path)):
            with pytest.raises(ModelError, match=message):
                evaluate(bad)
    assert not (tmp_path / "hacked").exists()
    content = torch.load(job.checkpoint)
    torch.save(content | {"classes": [str(c) for c in range(20, 30)]}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match=r"other\.pt was trained on other classes"):
        evaluate(replace(job, source=tmp_path / "other.pt"))
    torch.save(content | {"shape": [1, 16, 16]}, tmp_path / "larger.pt")
    with pytest.raises(ModelError, match=r"larger\.pt was trained on images of shape \(1, 16, 16\)"):
        evaluate(replace(job, source=tmp_path / "larger.pt"))
    assert not job.out.exists()


def test_under_torchrun_the_first_rank_waits_for_the_others(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="leave --workers out"):
        evaluate(job, workers=2)
    waited: list[float] = []

    def other_rank(seconds: float) -> None:
        waited.append(seconds)
        assert len(waited) < 3
        monkeypatch.setenv("RANK", "1")
        assert evaluate(job) is None

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(evaluation_ranks.time, "sleep", other_rank)
    content = evaluate(job)
    assert content is not None
    assert len(waited) == 1
    assert [r["score"]["samples"] for r in content["results"]] == [35] * 5


def test_a_worker_whose_parent_is_gone_stops_after_its_batch(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(job)
    opened.directory.open(opened.settings())
    seen = count_attempts(monkeypatch)
    _, sender = multiprocessing.Pipe(duplex=False)
    before = signal.getsignal(signal.SIGINT)
    try:
        evaluation_ranks._worker(job, 0, 2, -1, sender)  # no process has this number
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == []
    answers = iter([False, False, True])
    run_rank(opened, 0, 1, abandoned=lambda: next(answers))
    assert len(seen) == 2


@pytest.mark.procs
def test_worker_processes_say_what_one_process_says(job: Job, tmp_path: Path) -> None:
    whole = evaluate(replace(job, out=tmp_path / "whole"))
    assert said(evaluate(job, workers=2)) == said(whole)
    assert len(list(job.out.glob("verdicts-*.jsonl"))) == 2


@pytest.mark.procs
def test_a_worker_that_is_killed_is_one_clear_error(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(_: float) -> None:
        multiprocessing.active_children()[0].kill()

    monkeypatch.setattr(evaluation_ranks.time, "sleep", kill)
    with pytest.raises(CommError, match=r"worker \d ended with exit code -9; .* start again to continue"):
        evaluate(job, workers=2)
    assert not multiprocessing.active_children()


def test_a_workers_error_keeps_its_type_and_text(job: Job) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    bad = replace(job, checkpoint=job.out / "nowhere.pt")
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            evaluation_ranks._worker(bad, 0, 2, os.getppid(), sender)
    finally:
        signal.signal(signal.SIGINT, before)
    process = SimpleNamespace(exitcode=1)
    with pytest.raises(ModelError, match=r"nowhere\.pt: no such file"):
        evaluation_ranks._raise_first(Opened(job), [process], [receiver])


@pytest.mark.procs
def test_a_killed_evaluation_loses_nothing(job: Job, tmp_path: Path) -> None:
    job = replace(job, suite=replace(SUITE, steps=40))
    whole = evaluate(replace(job, out=tmp_path / "whole"))
    options = ["--data", str(job.data), "--attacks", "pgd", "--curve-eps", "0.05,0.1,0.2", "--eps", "0.1"]
    options += ["--steps", "40", "--images", "35", "--batch", "10", "--seed", "1", "--threads", "1", "--no-checks"]
    command = [sys.executable, "-m", "distrobust", "evaluate", str(job.checkpoint), "--out", str(job.out), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    path = job.out / "verdicts-0000.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_bytes().count(b"\n") >= 9):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = VerdictDirectory(job.out).read()
    assert 9 <= len(found) < 24
    assert said(evaluate(job)) == said(whole)
    after = VerdictDirectory(job.out).read()
    assert {key: after[key] for key in found} == found, "what was finished is kept as it was"


@pytest.mark.parametrize(("local", "threads"), [("1", []), ("4", [2])])
def test_ranks_of_one_machine_share_its_cores(
    job: Job, monkeypatch: pytest.MonkeyPatch, local: str, threads: list[int]
) -> None:
    """Of torchrun's 4 ranks, each on a machine of its own, with all of its cores, or on one."""
    ranks = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": local, "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(evaluation_ranks.os, "cpu_count", lambda: 8)
    seen: list[int] = []
    monkeypatch.setattr(evaluation_ranks.torch, "set_num_threads", seen.append)
    monkeypatch.setattr(evaluation_ranks, "run_rank", lambda *_, **__: None)
    assert evaluate(replace(job, threads=0)) is None
    assert seen == threads
