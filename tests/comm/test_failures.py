"""Damaged messages and silent peers end in an error that says where, and never in a gradient."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from harness.ranks import TIMEOUT_S, Rank, run_ranks
from harness.training import residuals, same, worker
from torch import Tensor

from distrobust.comm.transport import Local, Request, Transport
from distrobust.errors import CodecError, CommError

pytestmark = pytest.mark.ranks

Damage = Callable[[Tensor], object]


class Damaging(Transport):
    """Once told to, changes what arrives on this rank from rank 1."""

    damage: Damage | None = None

    def issue(self, request: Request | Local) -> torch.futures.Future[Tensor]:
        def result(future: torch.futures.Future[Tensor]) -> Tensor:
            received = future.value()
            if self.damage is not None:
                self.damage(received[1])
            return received

        return super().issue(request).then(result)


DAMAGES: dict[str, Damage] = {
    "one bit": lambda message: message[-1:].bitwise_xor_(16),
    "zeros": lambda message: message.zero_(),
    "another rank's bytes": lambda message: message.copy_(message.flip(0)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_message_is_an_error_that_names_rank_step_and_parameters(damage: Damage) -> None:
    def body(rank: Rank) -> None:
        transport = Damaging(rank.group)
        ours = worker(rank, transport=transport)
        for step in range(2):
            ours.step(step)
        transport.damage = damage
        before, parameters = residuals(ours.state), ours.parameters()
        text = r"step 2, message of rank 1 for [024]\.(weight|bias) \.\. .*: checksum.*nothing was applied"
        with pytest.raises(RuntimeError, match=text):
            ours.step(2)
        assert same(residuals(ours.state), before)
        assert same(ours.parameters(), parameters)
        with pytest.raises(CodecError, match=text):
            ours.state.raise_cause()

    run_ranks(2, body)


def test_an_old_message_is_not_taken_for_a_new_one() -> None:
    def body(rank: Rank) -> None:
        transport = Damaging(rank.group)
        ours = worker(rank, transport=transport)
        old: list[Tensor] = []
        transport.damage = lambda message: old.append(message.clone())
        ours.step(0)
        transport.damage = lambda message: message.copy_(old[0])
        with pytest.raises(RuntimeError, match="another step"):
            ours.step(1)

    run_ranks(2, body)


@pytest.mark.parametrize("density", [0.02, 1.0])
def test_a_peer_that_does_not_answer_is_an_error_within_the_timeout(density: float) -> None:
    """Rank 1 stops before its third backward. Nothing that rank 0 would apply comes back. Only the step that must fail
    has the short timeout: groups, DDP and the steps before have the usual one, however slow the machine.
    """
    stopped = threading.Event()

    def body(rank: Rank) -> None:
        ours = worker(rank, density=density)
        for step in range(2):
            ours.step(step)
        if rank.rank == 1:
            stopped.set()
            return
        assert stopped.wait(TIMEOUT_S)
        before, parameters = residuals(ours.state), ours.parameters()
        rank.group.set_timeout(timedelta(seconds=0.5))
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            ours.step(2)
        assert time.monotonic() - started < TIMEOUT_S - 5
        assert same(residuals(ours.state), before)
        assert same(ours.parameters(), parameters)
        with pytest.raises(CommError, match=r"step 2: rank 0 of 2: a collective failed, so another rank died"):
            ours.state.raise_cause()

    run_ranks(2, body)
