"""The terminal as rich sees it; the only place that makes a console."""

from collections.abc import Iterable

from rich.console import Console, RenderableType


def console(stderr: bool = False) -> Console:
    """One that shows text as it is: names may hold brackets and colons, which to rich are markup and emoji."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def show(parts: Iterable[RenderableType]) -> None:
    """Print tables and lines one below the other, at the terminal's width; what is wider is not cut."""
    screen = console()
    for part in parts:
        screen.print(part, crop=False)
