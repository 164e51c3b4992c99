"""Every error slimlm raises on purpose. Messages are one line: what, where, and what to change."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What torch, its CUDA libraries, C++ and the system call it. torch says it on a CPU by a mere RuntimeError.
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "cannot allocate memory",
    "bad_alloc",
    "_status_alloc_failed",
)


class SlimlmError(Exception):
    """Base of slimlm's own errors."""

    exit_code = 1


class UserError(SlimlmError):
    """The request cannot be carried out as made: a wrong path, a broken checkpoint, a value out of range."""

    exit_code = 2


class RunFailure(SlimlmError):
    """A run that was asked for correctly went wrong: numbers blew up, the disk filled."""


class Interrupted(SlimlmError):
    """The user stopped the run. exit_code: 128 and the signal's number, as shells have it; Ctrl-C's is 2."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Turns all that says there is no memory left into a RunFailure: one line, with what may help.

    Errors that were made of such a one count too. Also a decorator.
    """
    try:
        yield
    except Exception as error:
        if not _wants_memory(error):
            raise
        raise RunFailure(f"out of memory: {advice}") from error


def _wants_memory(error: BaseException | None) -> bool:
    if error is None or isinstance(error, RunFailure):  # said already
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY):
        return True
    return _wants_memory(error.__cause__)


def require_at_least(least: int, **values: int | None) -> None:
    """Raises UserError for the first of the values, by the names of their flags, that is given and smaller."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: give at least {least}")


def one_line(error: BaseException, limit: int = 160) -> str:
    """What another library's error says, short enough for a line of ours."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
