"""FedBuff: asynchronous moves of the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from federated.conftest import Simulate, made_up, module
from federated.test_laws import CODED, everything

from distrobust.errors import ConfigError, DivergedError
from distrobust.federated import checkpoint, settings
from distrobust.federated.buffered import Buffered
from distrobust.federated.timeline import ARRIVED

CLIENTS: dict[str, Any] = {"registered": 30, "per_round": 6, "partition": "dirichlet", "rows": 20}
SELDOM: dict[str, Any] = {"availability": {"name": "markov", "share": 0.05, "stay": 0.5}}
SLOW: dict[str, Any] = {"links": {"drop_out": 0.2, "compute_spread": 1.5}, "rounds": {"buffer": 4}}


def buffered(tmp_path: Path, **sections: Any) -> Buffered:
    values = {"data": {"path": "nowhere"}, "model": "linear", "clients": CLIENTS, **SLOW, **sections}
    return Buffered(settings.parse(values, "test"), made_up(), module("linear"), tmp_path / "scratch")


def test_every_move_takes_so_many_updates_and_keeps_so_many_clients_at_work(tmp_path: Path) -> None:
    simulation = buffered(tmp_path)
    clock, staleness = 0.0, []
    for number in range(30):
        record = simulation.step()
        assert record["round"] == number
        assert record["updates"] == 4
        assert record["clock_s"] == simulation.clock_s >= clock
        assert 5 <= len(simulation.jobs) <= 6
        assert len({job.client for job in simulation.jobs}) == len(simulation.jobs)
        assert set(simulation.starts) == {job.version for job in simulation.jobs}
        clock = simulation.clock_s
        staleness.append(record["staleness"])
    assert staleness[0] == 0
    assert max(staleness) > 1
    assert simulation.totals.updates == 120
    assert simulation.totals.lost > 10
    assert simulation.accuracies(made_up().held_out)["clean"].accuracy > 0.6


def test_updates_are_discounted_by_staleness(tmp_path: Path) -> None:
    """A buffer of one, so that a move is one client's update over sqrt(1 + staleness)."""
    simulation = buffered(tmp_path, rounds={"buffer": 1}, local={"batch_size": None, "rate": 0.2})
    seen = set()
    for _ in range(15):
        before, starts, jobs = simulation.shared, dict(simulation.starts), list(simulation.jobs)
        starts.setdefault(simulation.round, before)
        record = simulation.step()
        staleness = round(record["staleness"])
        ended = [job for job in jobs if job not in simulation.jobs and job.fate == ARRIVED]
        if len(ended) != 1:
            continue
        (job,) = ended
        assert staleness == record["round"] - job.version
        net = module("linear")
        start = starts[job.version]
        with torch.no_grad():
            for p, values in zip(net.parameters(), start.split([p.numel() for p in net.parameters()]), strict=True):
                p.copy_(values.view_as(p))
        rows = torch.from_numpy(simulation.partition.rows_of(job.client))
        loss = torch.nn.functional.cross_entropy(net(simulation.images[rows]), simulation.labels[rows])
        g = torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(net.parameters()))])
        torch.testing.assert_close(before - simulation.shared, 0.2 * g / (1 + staleness) ** 0.5, rtol=1e-3, atol=1e-6)
        seen.add(staleness)
    assert len(seen) > 2


def test_a_client_waits_until_its_update_has_been_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would send from a residual that it has sent from already."""
    simulation = buffered(tmp_path, clients={**CLIENTS, "registered": 11})
    train, used = simulation._train, []

    def listening(arrived: Any, clients: Any, *rest: Any) -> None:
        used.append(clients[arrived].tolist())
        train(arrived, clients, *rest)

    monkeypatch.setattr(simulation, "_train", listening)
    for _ in range(30):
        simulation.step()
    assert all(len(set(clients)) == 4 for clients in used)


def test_a_client_has_the_model_that_it_began_with(tmp_path: Path) -> None:
    simulation = buffered(tmp_path, **CODED)
    stale = 0
    for _ in range(20):
        before = list(simulation.jobs)
        simulation.step()
        arrived = [job for job in before if job not in simulation.jobs and job.fate == ARRIVED]
        for job in (*arrived, *simulation.jobs):
            assert simulation.last_seen[job.client] == job.version
        stale += sum(job.version < simulation.round - 1 for job in arrived)
    assert stale > 3


def test_a_client_that_was_lost_may_arrive_when_it_tries_again(tmp_path: Path) -> None:
    """With 1 client of 2 at work a step needs 2 attempts on average, and 10 in vain are 1 in 1,024."""
    few = {**CLIENTS, "registered": 2, "per_round": 1}
    simulation = buffered(tmp_path, clients=few, links={"drop_out": 0.5}, rounds={"buffer": 1})
    for _ in range(15):
        simulation.step()
    assert simulation.totals.updates == 15
    assert simulation.totals.lost > 4


@pytest.mark.parametrize("availability", ["bernoulli", "markov", "labels"])
def test_who_is_there_changes_while_the_server_waits(tmp_path: Path, availability: str) -> None:
    simulation = buffered(tmp_path, availability={"name": availability, "share": 0.05})
    for _ in range(10):
        assert simulation.step()["updates"] == 4
    assert simulation.num_waits > 10


@pytest.mark.parametrize("chosen", [{}, CODED, SELDOM], ids=["dense", "coded", "seldom there"])
def test_stopping_and_continuing_changes_nothing(tmp_path: Path, chosen: dict[str, Any]) -> None:
    whole, first, second = (buffered(tmp_path / str(i), **chosen) for i in range(3))
    expected = [whole.step() for _ in range(9)]
    for _ in range(5):
        first.step()
    checkpoint.save(first, tmp_path)
    assert checkpoint.load(second, tmp_path)
    found = [second.step() for _ in range(4)]
    for ours, theirs in zip(found, expected[5:], strict=True):
        assert {**ours, "time": 0, "host_s": 0} == {**theirs, "time": 0, "host_s": 0}
    assert all(torch.equal(a, b) for a, b in zip(everything(whole), everything(second), strict=True))


def test_no_hang_when_everything_is_lost_or_nobody_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DivergedError, match="every client was lost in its upload"):
        buffered(tmp_path, links={"drop_out": 1.0}).step()
    monkeypatch.setattr("distrobust.federated.buffered.NOBODY", 20)
    with pytest.raises(DivergedError, match="no client could be reached"):
        buffered(tmp_path, availability={"name": "bernoulli", "share": 1e-9}).step()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rounds": {"buffer": 2, "deadline_s": 1}}, r"rounds\.buffer excludes rounds\.deadline_s"),
        ({"rounds": {"buffer": 2}, "local": {"control_variates": True}}, r"and local\.control_variates"),
        ({"rounds": {"buffer": 25}}, "rounds.buffer 25 and clients.per_round 6 are more than 30 registered"),
    ],
)
def test_what_a_buffer_excludes_is_said(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.parse({"data": {"path": "x"}, "clients": CLIENTS, **sections}, "test")


def test_synchronous_rounds_know_no_staleness(simulate: Simulate) -> None:
    assert "staleness" not in simulate(clients=CLIENTS).step()
