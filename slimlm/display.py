"""Progress of the whole of the work, and where it shows if nobody said how: below a notebook's cell, or in the log."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slimlm.pace import Pace
from slimlm.progress import LogProgress, Progress, resident_memory

KERNEL = "ZMQInteractiveShell"  # what runs the cells of a notebook
COUNTABLE = 99_999  # steps of a stage; more are numbers nobody reads


@dataclass(eq=False)
class Whole(Progress):
    """Knows where the whole work stands; `show` is called whenever that changes."""

    pace: Pace = field(default_factory=Pace)

    def expect(self, parts: Sequence[Mapping[str, float]]) -> None:
        """Goes into the pace, as all that follows."""
        self.pace.expect(parts)

    def part(self, number: int) -> None:
        """Of what was expected."""
        self.pace.part = number

    def stage(self, name: str, total: int, first: int = 0) -> None:
        """And shows it."""
        self.pace.begin(name, total, first)
        self.show()

    def step(self, count: int = 1) -> None:
        """And shows it."""
        self.pace.done += count
        self.show()

    def show(self) -> None:
        """Of this nothing is."""

    @property
    def at(self) -> str:
        """The part, the stage and its step."""
        pace = self.pace
        part = f"step {pace.part + 1} of {pace.parts}, " if pace.parts > 1 else ""
        return f"{part}{pace.stage}" + (f" {pace.done}/{pace.total}" if 1 < pace.total <= COUNTABLE else "")

    @property
    def figures(self) -> str:
        """The share of all work, the time left of all, memory; of the stage at hand where more is not known."""
        left = self.pace.left
        of_all = " of all" if self.pace.parts else ""
        words = [f"{self.pace.share:.0%}{of_all}", *([] if left is None else [f"{in_words(left)} left"])]
        return ", ".join([*words, f"{resident_memory() / 1e9:.1f} GB"])


def in_words(seconds: float) -> str:
    """As 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Cell(Whole):
    """Below a notebook's cell: lines that stay, and one that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.display = sys.modules["IPython.display"].display
        self.shown = self.display({"text/plain": ""}, raw=True, display_id=True)

    def show(self) -> None:
        """In the line that changes."""
        self.shown.update({"text/plain": f"{self.at}: {self.figures}"}, raw=True)

    def line(self, text: str) -> None:
        """Below what was shown before."""
        self.display({"text/plain": text}, raw=True)

    def detail(self, text: str) -> None:
        """Too many for a cell."""


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return KERNEL in (kind.__name__ for kind in type(shell).__mro__)  # Colab's is derived from it


def usual(progress: Progress | None) -> Progress:
    """What a caller gave; else what shows most where this runs."""
    return progress or (Cell() if in_notebook() else LogProgress())
