"""Records for the person in front of the terminal.

On a terminal: one progress bar per phase. Otherwise (a file, a pipe, a pod's log): plain ASCII lines, one per
epoch. At the end, the table that compares the models before and after. 1 MB is 10^6 bytes.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from distrobust.metrics.jsonl import latest

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from distrobust.metrics.bars import Bars

PHASES = {"pretrain": "pre-training", "train": "fine-tuning"}

_FLAT_WIDTH = 110  # columns of the table when the output is no terminal


class Console:
    """Shows records on `stream` (default: standard error). `write` never raises for a missing field."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._bars: Bars | None = None
        self._phase: Mapping[str, Any] = {}
        self._step: Mapping[str, Any] = {}
        self._epoch: Mapping[str, Any] = {}

    def write(self, record: Mapping[str, Any]) -> None:
        event = record.get("event")
        if event == "phase":
            self._phase, self._step, self._epoch = record, {}, {}
            self._begin()
        elif event == "step":
            self._step = record
            self._advance()
        elif event == "epoch":
            self._epoch = record
            self._advance()
            if not self._live:
                self._say(self._epoch_line(record))
        else:
            text = _sentence(record)
            if text:
                self._say(text)

    def close(self) -> None:
        """Leaves the bars as they stand and gives the terminal back."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _say(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text if self._live else _ascii(text), file=self._stream, flush=True)

    def _begin(self) -> None:
        if not self._live:
            return
        if self._bars is None:
            from distrobust.metrics.bars import Bars

            self._bars = Bars(_rich(self._stream))
            self._bars.start()
        name = str(self._phase.get("phase"))
        self._bars.begin(name, PHASES.get(name, name), int(self._phase.get("num_steps") or 0))

    def _advance(self) -> None:
        if self._bars is not None:
            numbers = "  ".join(_numbers(self._step, self._epoch))
            self._bars.show(str(self._step.get("phase")), int(self._step.get("step") or 0), numbers)

    def _epoch_line(self, epoch: Mapping[str, Any]) -> str:
        name = str(epoch.get("phase"))
        place = f"epoch {epoch.get('epoch')}/{self._phase.get('num_epochs', '?')}"
        steps = f"step {epoch.get('step')}/{self._phase.get('num_steps', '?')}"
        attack = epoch.get("attack")
        under = [f"({attack})"] if attack and epoch.get("robust_accuracy") is not None else []
        return "  ".join([f"{PHASES.get(name, name)}:", place, steps, *_numbers(self._step, epoch), *under])


def print_summary(records: Iterable[Mapping[str, Any]], stream: TextIO, report: Path | None = None) -> None:
    """The before / after table of the `evaluation` records, the bytes sent, and where the report is."""
    records = latest(records)
    evaluations = [record for record in records if record.get("event") == "evaluation"]
    console = _rich(stream)
    if evaluations:
        console.print(_table(evaluations, plain=not stream.isatty()))
    flagged: dict[str, list[str]] = {}
    for row in evaluations:
        for flag in row.get("flags") or ():
            flagged.setdefault(str(flag), []).append(f"{row.get('model')} under {row.get('attack')}")
    lines = [
        f"note: {flag}" + ("" if len(rows) == len(evaluations) else f" ({', '.join(rows)})")
        for flag, rows in flagged.items()
    ]
    lines += traffic(records)
    if report is not None:
        lines.append(f"report: {report}")
    for line in lines:
        text = line if stream.isatty() else _ascii(line)
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def traffic(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per phase: the bytes a worker sent against those of a dense fp32 all-reduce, as counted."""
    last = {record.get("phase"): record for record in records if record.get("event") == "step"}
    lines = []
    for phase, record in last.items():
        sent, dense = record.get("sent_bytes"), record.get("dense_bytes")
        if not sent or not dense:
            continue
        factor = f"{times(dense / sent)} times more" if dense >= sent else f"{times(sent / dense)} times less"
        same = abs(dense / sent - 1) < 0.01
        lines.append(
            f"{PHASES.get(str(phase), str(phase))}: sent {megabytes(sent)} per worker; "
            "a dense fp32 all-reduce "
            + ("sends the same" if same else f"would have sent {megabytes(dense)} ({factor})")
        )
    return lines


def percent(ratio: float | None) -> str:
    """A ratio of 0 to 1 as text, such as "37.5 %"."""
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


def times(factor: float) -> str:
    """A factor as text with three digits, such as "51.2" or "126"."""
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.1f}"


def megabytes(num_bytes: float) -> str:
    """Bytes as text in MB of 10^6 bytes, with three digits where that matters."""
    mb = num_bytes / 1e6
    return f"{mb:,.0f} MB" if mb >= 100 else f"{mb:.3g} MB"


def _numbers(step: Mapping[str, Any], epoch: Mapping[str, Any]) -> list[str]:
    """Loss, accuracies, density, compression and bytes, each only when known."""
    parts = []
    if step.get("loss") is not None:
        parts.append(f"loss {step['loss']:.3g}")
    if epoch.get("clean_accuracy") is not None:
        parts.append(f"clean {percent(epoch['clean_accuracy'])}")
    if epoch.get("robust_accuracy") is not None:
        parts.append(f"robust {percent(epoch['robust_accuracy'])}")
    if step.get("density") is not None:
        parts.append(f"density {step['density']:.3g}")
    if step.get("sent_bytes"):
        factor = (step.get("dense_bytes") or 0) / step["sent_bytes"]
        parts += [f"{times(factor)}x less"] * (factor >= 1.05) + [f"sent {megabytes(step['sent_bytes'])}"]
    if step.get("nonfinite_steps"):
        parts.append(f"skipped {step['nonfinite_steps']}")
    return parts


def _sentence(record: Mapping[str, Any]) -> str | None:
    """The line for a record that is neither a step nor an epoch; None for what needs no line."""
    event = record.get("event")
    if event == "run":
        resumed = record.get("resumed_step")
        start = f"resuming after step {resumed}" if resumed else "starting"
        workers = "1 worker" if record.get("world_size") == 1 else f"{record.get('world_size')} workers"
        return f"{start}: {workers}, {record.get('num_parameters') or 0:,} parameters"
    if event == "notice":
        return f"note: {record.get('text')}"
    if event == "evaluation":
        accuracy = percent(record.get("accuracy"))
        return f"evaluated {record.get('model')}, {record.get('attack')}: {accuracy} of {record.get('samples')}"
    if event == "done":
        return f"done in {record.get('seconds', 0):.0f} s"
    return None


def _table(evaluations: list[Mapping[str, Any]], plain: bool) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ASCII2 if plain else box.ROUNDED)
    table.add_column("model", no_wrap=True)
    table.add_column("attack", no_wrap=True)
    for name in ("accuracy", "95 % interval", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in evaluations:
        interval = f"{percent(row.get('low'))} - {percent(row.get('high'))}"
        cells = [
            row.get("model"),
            row.get("attack"),
            percent(row.get("accuracy")),
            interval,
            row.get("samples"),
        ]
        table.add_row(*(Text(_ascii(str(cell)) if plain else str(cell)) for cell in cells))
    return table


def _rich(stream: TextIO) -> "RichConsole":
    from rich.console import Console as RichConsole

    width = None if stream.isatty() else _FLAT_WIDTH
    return RichConsole(file=stream, width=width, force_terminal=stream.isatty(), highlight=False)


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()
