"""Every error slimlm raises on purpose. Messages are one line: what, where, and what to change."""

import difflib
from collections.abc import Iterable


class SlimlmError(Exception):
    """Base of slimlm's own errors."""

    exit_code = 1


class UserError(SlimlmError):
    """The request cannot be carried out as made: a wrong path, a broken checkpoint, a value out of range."""

    exit_code = 2


class RunFailure(SlimlmError):
    """A run that was asked for correctly went wrong: numbers blew up, the disk filled."""


class Interrupted(SlimlmError):
    """The user stopped the run."""

    exit_code = 130


def one_line(error: BaseException, limit: int = 160) -> str:
    """What another library's error says, short enough for a line of ours."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
