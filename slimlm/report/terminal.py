"""The terminal as rich sees it; the only place that makes a console."""

import io
import sys
from collections.abc import Iterable
from textwrap import fill

from rich.console import Console, RenderableType
from rich.text import Text


def console(stderr: bool = False) -> Console:
    """One that shows text as it is: names may hold brackets and colons, which to rich are markup and emoji."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def lines_of(*texts: str) -> list[Text]:
    """Lines that are not broken, however long: commands and paths, which are to be copied."""
    return [Text(line, no_wrap=True) for text in texts for line in text.splitlines()]


def sentences(*texts: str) -> list[Text]:
    """Lines that are broken between words where a terminal is too narrow for them, and in a log or pipe not at all."""
    screen = console()
    width = screen.width if screen.is_terminal else sys.maxsize
    lines = [line for text in texts for line in text.splitlines()]
    return lines_of(*(fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines))


def show(parts: Iterable[RenderableType], screen: Console | None = None) -> None:
    """Print tables and lines one below the other, at the terminal's width; what is wider is not cut."""
    screen = screen or console()
    for part in parts:
        is_whole = isinstance(part, Text) and part.no_wrap is True  # which a console forgets
        screen.print(part, crop=False, soft_wrap=is_whole)


def as_text(parts: Iterable[RenderableType]) -> str:
    """The same as a string, without colours."""
    text = io.StringIO()
    show(parts, Console(file=text, width=console().width, force_jupyter=False, force_terminal=False))
    return text.getvalue().rstrip("\n")
