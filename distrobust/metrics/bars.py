"""The progress bars of the console, one per phase; imported only when the output is a terminal."""

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class Bars(Progress):
    """A bar per phase and its numbers on the line below, so that 80 columns are enough for both."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps", markup=False),
            TimeElapsedColumn(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(),
            console=console,
        )
        self._phases: dict[str, TaskID] = {}

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield Text(f"  {task.fields['numbers']}", no_wrap=True, overflow="ellipsis")

    def begin(self, phase: str, title: str, num_steps: int) -> None:
        """Adds the bar of a phase, or starts it again after a restart."""
        if phase in self._phases:
            self.remove_task(self._phases[phase])
        self._phases[phase] = self.add_task(title, total=num_steps, numbers="")

    def show(self, phase: str, step: int, numbers: str) -> None:
        """Moves the bar of a phase; a phase that never began is ignored."""
        if phase in self._phases:
            self.update(self._phases[phase], completed=step, numbers=numbers)
