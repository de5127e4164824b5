"""A deadline that nobody can meet is refused before the first round, and only such a one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federated.conftest import Simulate
from federated.test_clock import write

from distrobust.errors import ConfigError, DivergedError

CLIENTS: dict[str, Any] = {"registered": 12, "per_round": 12}
SLOW: dict[str, Any] = {"download_mbit": 0.01, "upload_mbit": 0.01}


def bound(simulate: Simulate, **sections: Any) -> float:
    """What the message wants the deadline to be above."""
    with pytest.raises(ConfigError) as caught:
        simulate(rounds={"deadline_s": 1e-4}, **sections)
    assert "\n" not in str(caught.value)
    found = re.search(r"got 0.0001, which none of 12 clients can meet; wanted more than ([\d.]+):", str(caught.value))
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"links": SLOW},
        {"links": SLOW, "upload": {"density": 0.01}},
        {"clients": {**CLIENTS, "rows": 20}, "local": {"steps": 7}},
        {"clients": {**CLIENTS, "partition": "dirichlet", "alpha": 3.0}, "local": {"control_variates": True}},
        {"links": {"examples_per_s": 1.0}, "personal": {"test": 0.5}},
    ],
    ids=str,
)
def test_a_little_above_the_bound_the_fastest_client_arrives_and_a_little_below_nobody(
    simulate: Simulate, sections: dict[str, Any]
) -> None:
    sections = {"clients": CLIENTS, **sections}
    needed = bound(simulate, **sections)
    assert simulate(rounds={"deadline_s": 1.001 * needed}, **sections).step()["updates"] == 1
    with pytest.raises(ConfigError):
        simulate(rounds={"deadline_s": 0.999 * needed}, **sections)


def test_with_compressed_downloads_a_late_client_may_be_in_time_in_a_later_round(simulate: Simulate) -> None:
    """The whole model takes most of the time; a client that has it only needs the little that it missed."""
    sections: dict[str, Any] = {"clients": CLIENTS, "links": SLOW, "upload": {"density": 0.01}}
    dense = bound(simulate, **sections)
    needed = bound(simulate, **sections, download={"density": 0.01})
    assert needed < dense
    simulation = simulate(rounds={"deadline_s": 1.001 * needed}, **sections, download={"density": 0.01})
    updates = [simulation.step()["updates"] for _ in range(3)]
    assert updates[0] == 0
    assert max(updates) > 0


def test_a_trace_counts_with_its_best_bandwidth(simulate: Simulate, tmp_path: Path) -> None:
    links = {"traces": write(tmp_path / "t.csv", "a,0,0.5,0.1,0.1", "a,0.5,4,1,1"), "latency_s": 0}
    needed = bound(simulate, clients=CLIENTS, links=links)
    n = simulate().network.spec.n
    assert needed >= 2 * 4 * n / 125_000
    simulate(clients=CLIENTS, links=links, rounds={"deadline_s": 1.001 * needed})


def test_those_who_are_chosen_being_too_slow_ends_with_a_reason(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest could meet it, but is never there."""
    needed = bound(simulate, clients=CLIENTS)
    simulation = simulate(clients={**CLIENTS, "per_round": 1}, rounds={"deadline_s": 1.001 * needed})
    slowest = np.argmax(simulation.links.compute_s(np.arange(12), np.full(12, 20)))
    monkeypatch.setattr(simulation.availability, "select", lambda *_: np.array([slowest]))
    for _ in range(9):
        assert simulation.step()["updates"] == 0
    with pytest.raises(DivergedError, match=r"no update for 10 rounds in a row: rounds\.deadline_s is .* the fastest"):
        simulation.step()
