"""Simulated clients on Ray actors: the same bits, whatever dies, and clear answers where there is no such Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from federated.conftest import Simulate
from federated.test_command import arguments, run
from federated.test_laws import CODED, ROUGH, SOME, everything

from distrobust.cluster import ray_clients, ray_session
from distrobust.errors import ConfigError
from distrobust.federated import settings

KINDS: list[dict[str, Any]] = [
    {**CODED, "upload": {**CODED["upload"], "momentum": 0.9}},
    {"local": {"control_variates": True}, "model": "mlp", "attack": {"steps": 1}},
]


@pytest.fixture(scope="module")
def four_cpus() -> Iterator[None]:
    """One private Ray for all tests here."""
    with ray_session.session(None, "execute.address", 4, {}):
        yield


@pytest.fixture
def connected(four_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_clients, "session", lambda *_: nullcontext())


def steps(simulate: Simulate, actors: int | None, executor: str, **kind: Any) -> list[torch.Tensor]:
    """Everything that is left after a few rounds of cohorts of 2."""
    execute = {"cohort": 2, "executor": executor, "actors": actors}
    simulation = simulate(clients=SOME, **ROUGH, **kind, execute=execute)
    if actors is None:
        records = [simulation.step() for _ in range(4)]
    else:
        with ray_clients.on_actors(simulation.worker) as simulation.workers:
            records = [simulation.step() for _ in range(4)]
    assert sum(record["updates"] for record in records) > 8
    return everything(simulation)


@pytest.mark.ray
@pytest.mark.parametrize(("kind", "executor", "actors"), [(KINDS[0], "batched", 3), (KINDS[1], "serial", 2)])
def test_any_number_of_actors_gives_the_bits_of_one_process(
    simulate: Simulate, connected: None, kind: dict[str, Any], executor: str, actors: int
) -> None:
    here, there = (steps(simulate, number, executor, **kind) for number in (None, actors))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.ray
def test_an_actor_that_dies_changes_nothing(
    simulate: Simulate, connected: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    mark = tmp_path / "died"

    class DiesOnce(ray_clients.Actor):
        def work(self, task: Any) -> Any:
            if task.round_number == 2 and not mark.exists():
                mark.touch()
                os._exit(1)
            return super().work(task)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(ray_clients, "Actor", DiesOnce)
    here, there = (steps(simulate, actors, "batched", **KINDS[0]) for actors in (None, 2))
    assert mark.exists()
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.ray
def test_more_actors_than_the_cluster_has_cores_are_refused(simulate: Simulate, connected: None) -> None:
    simulation = simulate(execute={"actors": 9})
    with pytest.raises(
        ConfigError, match=r"execute: 9 actors need 9 CPU, the Ray cluster has 4; lower execute\.actors"
    ):
        steps(simulate, 9, "batched")
    assert simulation.round == 0


def test_a_cluster_of_another_version_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is what Ray 2.60 says of a head of 2.55."""
    import ray

    text = """Version mismatch: The cluster was started with:
    Ray: 2.55.1
    Python: 3.11.7
This process on node 192.0.2.2 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""

    def refuse(**_: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(ConfigError, match=r"execute\.address: got auto, a cluster of another version") as caught,
        ray_session.session("auto", "execute.address", 1, {}),
    ):
        pass
    assert "(Ray: 2.55.1 Python: 3.11.7; here: Ray: 2.60.0 Python: 3.11.7); install that one here" in str(caught.value)


def test_an_address_where_nobody_answers_is_one_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("execute.actors=2", "execute.address=127.0.0.1:1")
    assert run(monkeypatch, *arguments(digits, tmp_path, *given)) == 2
    error = capsys.readouterr().err
    assert "execute.address: got 127.0.0.1:1, where no Ray head answers" in error
    assert error.count("\n") == 1


def test_an_address_goes_with_actors() -> None:
    with pytest.raises(ConfigError, match="address auto goes with a number of actors, got null"):
        settings.parse({"data": {"path": "x"}, "execute": {"address": "auto"}}, "test")
