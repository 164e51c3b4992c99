"""The terminal as rich sees it; the only place that makes a console."""

import io
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.text import Text


def console(stderr: bool = False) -> Console:
    """One that shows text as it is: names may hold brackets and colons, which to rich are markup and emoji."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def lines_of(*texts: str) -> list[Text]:
    """Lines that are not broken, however long: commands and paths are to be copied."""
    return [Text(line, no_wrap=True, overflow="ignore") for text in texts for line in text.splitlines()]


def show(parts: Iterable[RenderableType], screen: Console | None = None) -> None:
    """Print tables and lines one below the other, at the terminal's width; what is wider is not cut."""
    screen = screen or console()
    for part in parts:
        screen.print(part, crop=False)


def as_text(parts: Iterable[RenderableType]) -> str:
    """The same as a string, without colours."""
    text = io.StringIO()
    show(parts, Console(file=text, width=console().width, force_jupyter=False, force_terminal=False))
    return text.getvalue().rstrip("\n")
