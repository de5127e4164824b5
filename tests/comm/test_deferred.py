"""Compression that is set up before model and optimizer exist ends up as the same compression."""

import pytest
import torch
from harness.ranks import Rank, run_ranks
from harness.training import Worker, residuals, same, worker

from distrobust.comm.deferred import Deferred, compression_hook
from distrobust.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.ranks


def started(rank: Rank, deferred: Deferred, early: bool) -> Worker:
    """`early`: the trainer has registered the hook when `start` is called, as Lightning does on CUDA only."""
    one = worker(rank, density=None)
    if early:
        one.ddp.register_comm_hook(deferred, compression_hook)
    one.compression = deferred.start(one.ddp, one.optimizer)
    return one


@pytest.mark.parametrize("early", [True, False])
def test_deferred_compression_equals_compress_and_a_state_loaded_before_the_start_counts(early: bool) -> None:
    def body(rank: Rank) -> None:
        usual = worker(rank)
        first = Deferred(0.02, fuse_below=100)
        ours = started(rank, first, early)
        for step in range(3):
            usual.step(step)
            ours.step(step)
        assert same(ours.parameters(), usual.parameters())
        second = Deferred(0.02, fuse_below=100)
        second.load_state_dict(first.state_dict())
        assert second.state_dict()["step"] == 3
        resumed = started(rank, second, early)
        resumed.ddp.module.load_state_dict(ours.ddp.module.state_dict())
        for one in (usual, resumed):
            one.step(3)
        assert same(resumed.parameters(), usual.parameters())
        assert same(residuals(resumed.state), residuals(usual.state))

    run_ranks(2, body)


def test_a_backward_before_the_start_says_what_is_missing() -> None:
    def body(rank: Rank) -> None:
        one = worker(rank, density=None)
        deferred = Deferred(0.02)
        one.ddp.register_comm_hook(deferred, compression_hook)
        with pytest.raises((ConfigError, RuntimeError), match=r"was deferred and never started: call start\(model"):
            one.backward(0)
        with pytest.raises(ConfigError, match="never started"):
            deferred.state_dict()

    run_ranks(1, body)


def test_another_hook_in_its_place_and_a_foreign_state_are_refused() -> None:
    def body(rank: Rank) -> None:
        one = worker(rank)
        with pytest.raises(RuntimeError, match="register_comm_hook"):
            Deferred(0.02, momentum="optimizer").start(one.ddp, torch.optim.SGD(one.ddp.parameters(), lr=0.1))
        deferred = Deferred(0.02)
        deferred.load_state_dict({})
        with pytest.raises(CheckpointError, match=r"not what Compression.state_dict\(\) returned"):
            started(rank, deferred, early=False)

    run_ranks(1, body)
