"""A job on two machines of two workers, whose exchange has two levels while everything else has one."""

import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distrobust import config as configuration
from distrobust.config import Config
from distrobust.train import job, loop
from distrobust.train.rundir import RunDirectory
from distrobust.train.state import TrainState
from distrobust.train.step import Recipe, StepResult, train_step
from tests.harness.jobs import Crash, Silent, assert_equal, records_of, weights_of
from tests.harness.ranks import Processes
from tests.train.conftest import MakeConfig

LAST = 3  # checkpoints come every second step


def run_all(rank: int, pipe: Connection) -> None:
    """Rank `rank` of jobs one after the other; with each configuration comes whether all ranks die before a step."""
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "2", str(rank % 2)
    sizes: set[int] = set()
    dies = False

    def looked_at(state: TrainState, images: Tensor, labels: Tensor, recipe: Recipe, r: int) -> StepResult:
        local = state.compression.settings.transport.local
        sizes.add(1 if local is None else local.num_ranks)
        if dies and (state.position.phase, state.position.step) == ("train", LAST):
            raise Crash
        return train_step(state, images, labels, recipe, r)

    loop.train_step = looked_at  # type: ignore[assignment]
    while (given := pipe.recv()) is not None:
        values, dies = given
        sizes.clear()
        try:
            status = job.run(configuration.parse(values, "test"), torch.device("cpu"), [Silent()]).status
        except Crash:
            status = "died"
        pipe.send((status, sizes))


@pytest.mark.procs
@pytest.mark.timeout(240)
def test_a_run_on_two_levels_saves_every_rank_scores_as_one_and_continues_bit_identically(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    changes = (
        "noise=null",
        "train.patience=5",
        "compress={density: 0.05, warmup: 0}",
        "attack.watch_every=2",
        "cluster.timeout_s=60",
    )
    whole, config = (make_config(*changes, f"run.dir={tmp_path / name}") for name in ("whole", "crashed"))
    with Processes(4, run_all, tmp_path, collective_timeout_s=60) as processes:

        def outcomes(config: Config, dies: bool = False) -> list[tuple[str, set[int]]]:
            RunDirectory(config.run.dir).open(config)
            for pipe in processes.pipes:
                pipe.send((config.model_dump(mode="json"), dies))
            return [processes.receive(rank, timeout_s=120) for rank in range(4)]

        assert outcomes(whole) == [("done", {1, 2})] * 4  # dense pre-training has one level
        assert outcomes(config, dies=True) == [("died", {1, 2})] * 4
        saved = {path.name for path in (config.run.dir / f"checkpoints/1-train-{LAST - 1:07}").iterdir()}
        assert saved == {"manifest.json", "shared.pt", *(f"rank-{rank}.pt" for rank in range(4))}
        assert outcomes(config) == [("done", {2})] * 4
        for pipe in processes.pipes:
            pipe.send(None)
    assert [r["resumed_step"] for r in records_of(config, "run")] == [0, LAST - 1]
    assert_equal(weights_of(config), weights_of(whole))
    scores, others = ([(r["robust_accuracy"], r["samples"]) for r in records_of(c, "epoch")] for c in (whole, config))
    assert scores == others[-len(scores) :]
    assert {samples for _, samples in scores} == {32}  # all held-out rows, once
