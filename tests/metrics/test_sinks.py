"""Laws of the room as a whole: light to import, and one failing sink does not keep others open."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from distrobust.metrics import Fanout


class Memory:
    def __init__(self, fails: bool = False) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.closed = False
        self.fails = fails

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True
        if self.fails:
            raise OSError("disk full")


def test_every_sink_gets_every_record_in_order() -> None:
    first, second = Memory(), Memory()
    with Fanout(first, second) as sinks:
        sinks.write({"event": "notice", "text": "a"})
        sinks.write({"event": "done"})
    assert first.records == second.records == [{"event": "notice", "text": "a"}, {"event": "done"}]
    assert first.closed
    assert second.closed


def test_a_sink_that_fails_to_close_leaves_no_other_open() -> None:
    broken, fine = Memory(fails=True), Memory()
    with pytest.raises(OSError, match="disk full"):
        Fanout(broken, fine).close()
    assert fine.closed


def test_importing_the_sinks_imports_no_third_party_package() -> None:
    code = (
        "import sys, distrobust.errors; before = set(sys.modules)\n"
        "import distrobust.metrics, distrobust.metrics.jsonl, distrobust.metrics.console\n"
        "import distrobust.metrics.prometheus, distrobust.report\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'prometheus_client', 'rich', 'matplotlib', 'ray', 'torch'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
