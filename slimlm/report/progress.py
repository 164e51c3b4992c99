"""Progress on the terminal: a bar with the time left, and the lines worth keeping above it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from slimlm.progress import Progress
from slimlm.report.terminal import console


@dataclass(eq=False)
class BarProgress(Progress):
    """A bar with the time left for the stage at hand, and lines that stay above it."""

    bars: RichProgress
    current: TaskID | None = None

    def stage(self, name: str, total: int) -> None:
        if self.current is not None:
            self.bars.remove_task(self.current)
        self.current = self.bars.add_task(name, total=total)

    def step(self, count: int = 1) -> None:
        if self.current is not None:
            self.bars.advance(self.current, count)

    def line(self, text: str) -> None:
        self.bars.console.print(text, soft_wrap=True)


@contextmanager
def progress_bars() -> Iterator[BarProgress]:
    """Bars on standard error, gone when the work is done."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    terminal = console(stderr=True)
    with RichProgress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bars:
        yield BarProgress(bars)
