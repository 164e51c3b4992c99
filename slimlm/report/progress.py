"""Progress for commands: one bar of all the work on a terminal, a line a minute in a log."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from slimlm.display import Whole
from slimlm.progress import Progress
from slimlm.report.terminal import console

MINUTE = 60.0  # seconds


class Bar(Whole):
    """A bar of all the work on a terminal, and lines that stay above it."""

    def __init__(self, bars: RichProgress) -> None:
        super().__init__()
        self.bars = bars
        self.task = bars.add_task("", total=1.0)

    def show(self) -> None:
        """As long as the share that is done."""
        self.bars.update(self.task, description=self.at, completed=self.pace.share)

    def line(self, text: str) -> None:
        """Above the bar, broken between words."""
        self.bars.console.print(text)


class _Figures(ProgressColumn):
    """Read whenever the bar is drawn."""

    whole: Whole | None = None

    def render(self, task: Task) -> Text:
        return Text(self.whole.figures if self.whole is not None else "")


class Logged(Whole):
    """Lines in a log, and where the work stands when it is asked."""

    def line(self, text: str) -> None:
        """At once."""
        console(stderr=True).print(text, soft_wrap=True)

    def detail(self, text: str) -> None:
        """Too many for a log."""

    def tell(self) -> None:
        """Where the work stands."""
        self.line(f"{self.at}: {self.figures}")


@contextmanager
def progress_shown() -> Iterator[Progress]:
    """On standard error: a bar that is gone when the work is done, or a line a minute where that is no terminal."""
    terminal = console(stderr=True)
    if not terminal.is_terminal:
        with _every_minute(Logged()) as logged:
            yield logged
        return
    figures = _Figures(Column(no_wrap=True))
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
        BarColumn(10),
        figures,
    )
    with RichProgress(*columns, console=terminal, transient=True) as bars:
        figures.whole = bar = Bar(bars)
        yield bar


@contextmanager
def _every_minute(logged: Logged) -> Iterator[Logged]:
    over = threading.Event()

    def tell() -> None:
        while not over.wait(MINUTE):
            logged.tell()

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield logged
    finally:
        over.set()
        thread.join()
