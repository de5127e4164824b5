"""A Ray cluster on simulated hosts, where one of them cannot be made."""

import contextlib

import pytest

from distrobust.cluster import lab
from distrobust.errors import LabError
from distrobust.lab.link import Link


def test_a_host_that_comes_about_only_in_part_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self) -> None:
            self.hosts: dict[int, None] = {}

        def add(self) -> int:
            self.hosts[0] = None
            raise LabError("lab: tc: no such thing")

        def remove(self, number: int) -> None:
            del self.hosts[number]

    broken = Broken()
    monkeypatch.setattr(lab, "switch", lambda *_, **__: contextlib.nullcontext(broken))
    with pytest.raises(LabError, match="no such thing"), lab.ray_lab(1, Link(1e9)):
        pass
    assert not broken.hosts
