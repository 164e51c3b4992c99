"""The terminal as rich sees it; the only place that makes a console."""

from rich.console import Console


def console(stderr: bool = False) -> Console:
    """One that shows text as it is: names may hold brackets and colons, which to rich are markup and emoji."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
