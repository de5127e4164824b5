"""Laws of the room as a whole: light to import, and one failing sink does not keep others open."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from distrobust.metrics import Fanout, OptionalSink


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


def test_a_librarys_sink_that_fails_is_given_up_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Full(Memory):
        def write(self, record: Mapping[str, Any]) -> None:
            super().write(record)
            raise RuntimeError("no space\nleft")

    full, fine, broken = Full(), Memory(), Memory(fails=True)
    with Fanout(OptionalSink("metrics.wandb", full), fine, OptionalSink("metrics.tensorboard", broken)) as sinks:
        for number in range(3):
            sinks.write({"event": "step", "step": number})
    assert (len(full.records), len(fine.records), len(broken.records)) == (1, 3, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.wandb: given up for the rest of this start: no space left",
        "metrics.tensorboard: given up for the rest of this start: disk full",
    ]


def test_importing_the_sinks_imports_no_third_party_package() -> None:
    code = (
        "import sys, distrobust.errors; before = set(sys.modules)\n"
        "import distrobust.metrics, distrobust.metrics.jsonl, distrobust.metrics.console\n"
        "import distrobust.metrics.prometheus, distrobust.metrics.tensorboard, distrobust.metrics.weights_and_biases\n"
        "import distrobust.report\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'prometheus_client', 'rich', 'matplotlib', 'ray', 'torch', 'tensorboard', 'wandb'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
