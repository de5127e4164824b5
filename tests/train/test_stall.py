"""Where nobody gets on, every rank's stacks are left, and the error says where."""

import logging
import multiprocessing
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distrobust.errors import CommError, ConfigError
from distrobust.train import stall
from tests.harness.jobs import records_of, run_job
from tests.train.conftest import MakeConfig


def test_without_a_stall_nothing_is_left(tmp_path: Path) -> None:
    with stall.watched(tmp_path / "stacks", 1, after_s=3) as watch:
        for _ in range(35):
            time.sleep(0.1)
            watch.beat()
    assert list((tmp_path / "stacks").iterdir()) == []


def test_a_stall_leaves_the_stacks_and_the_next_beat_says_for_how_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with stall.watched(tmp_path, 1, after_s=0.2) as watch:
        _hang(0.5)
        watch.beat()
        _hang(0.5)
        watch.beat()
    [file] = tmp_path.iterdir()
    assert file.name.startswith("rank-1-")
    assert file.read_text().count("in _hang") == 2
    said = [re.match(r"rank 1: nothing got on for (\S+) s; stacks: ", r.getMessage()) for r in caplog.records]
    assert len(said) == 2
    assert all(match is not None and 0.5 <= float(match[1]) < 10 for match in said)


def test_a_beat_costs_next_to_nothing(tmp_path: Path) -> None:
    with stall.watched(tmp_path, 0, after_s=60) as watch:
        started = time.perf_counter()
        for _ in range(10_000):
            watch.beat()
        assert time.perf_counter() - started < 0.5  # 50 us each; well below 1 us measured


def test_the_error_names_the_stacks_left_meanwhile_once(tmp_path: Path) -> None:
    (tmp_path / "rank-7-1.txt").write_text("of an earlier stall")
    wanted = f"^too late; stacks of ranks 0, 1: {tmp_path}$"
    with pytest.raises(CommError, match=wanted), stall.named(tmp_path), stall.named(tmp_path):
        _fail(CommError("too late"), tmp_path)


def test_an_error_without_stacks_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(CommError, match=r"^gone$"), stall.named(tmp_path):
        raise CommError("gone")
    with pytest.raises(ConfigError, match=r"^no$"), stall.named(tmp_path):
        _fail(ConfigError("no"), tmp_path)


def test_a_run_beats_with_every_step_and_every_batch_of_an_evaluation(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[str] = []
    monkeypatch.setattr(stall.Watch, "beat", lambda self: beats.append(sys._getframe(1).f_code.co_name))
    config = make_config("evaluate.batch_size=8")
    run_job(config)
    steps = sum(record["num_steps"] for record in records_of(config, "phase"))
    assert beats.count("_run_steps") == steps
    assert beats.count("batches") >= 4 * 40 / 8  # the 40 test images, clean and attacked, of two models
    assert list((config.run.dir / "stacks").iterdir()) == []


@pytest.mark.procs
def test_a_rank_that_hangs_in_a_step_is_found_by_the_stacks_of_all(make_config: MakeConfig) -> None:
    """Rank 1 hangs in its third step; rank 0 waits for it in the backward pass until the timeout, and says so."""
    config = make_config(
        "cluster={workers: 2, launcher: torchrun, timeout_s: 6}", "pretrain=null", "checkpoint={retries: 0}"
    )
    store = config.run.dir.parent / "store"
    context = multiprocessing.get_context("spawn")
    errors = context.Queue()
    values = config.model_dump(mode="json")
    ranks = [context.Process(target=_rank, args=(rank, values, str(store), errors)) for rank in (0, 1)]
    try:
        for process in ranks:
            process.start()
        rank, kind, text = errors.get(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert (rank, kind) == (0, "CommError")
    assert text.endswith(f"; stacks of ranks 0, 1: {config.run.dir / 'stacks'}")
    by_rank = {path.name.split("-")[1]: path.read_text() for path in (config.run.dir / "stacks").iterdir()}
    assert "in _hang" in by_rank["1"]
    assert "in _hang" not in by_rank["0"]
    assert "in backward" in by_rank["0"] or "in train_step" in by_rank["0"]


def _fail(error: Exception, stacks: Path) -> None:
    for rank in (1, 0):
        (stacks / f"rank-{rank}-123.txt").write_text("Timeout")
    (stacks / "rank-2-123.txt").touch()  # was killed before it stalled
    raise error


def _hang(seconds: float) -> None:
    time.sleep(seconds)


def _rank(rank: int, values: dict[str, Any], store: str, errors: "multiprocessing.Queue[Any]") -> None:
    import torch.distributed as dist

    from distrobust import config as configuration
    from distrobust.train import job, launch, loop
    from distrobust.train.rundir import RunDirectory
    from distrobust.train.step import train_step

    config = configuration.parse(values, "test")

    def step(state: Any, *arguments: Any) -> Any:
        if rank == 1 and state.position.step == 2:
            _hang(60)
        return train_step(state, *arguments)

    loop.train_step = step  # type: ignore[assignment]
    logging.getLogger().setLevel(logging.ERROR)
    RunDirectory(config.run.dir).path.mkdir(parents=True, exist_ok=True)
    group = dist.FileStore(store, 2)  # type: ignore[attr-defined]
    try:
        with launch._process_group(config, store=group, rank=rank, world_size=2) as device:
            job.run(config, device, [])
    except Exception as error:
        errors.put((rank, type(error).__name__, str(error)))
