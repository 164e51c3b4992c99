"""Standard output and error that no run fails on: closed ones, pipes nobody reads, terminals that know ASCII only."""

import codecs
import os
import sys
from typing import Any, TextIO

IN_ASCII = str.maketrans({"±": "+-", "‖": "||", "→": "->"})


class Lossy:
    """A stream that goes on when nobody takes what it is given any more: a run is worth more than its progress."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if not isinstance(error, BlockingIOError):  # that one's reader is merely slow
            to_nowhere(self.stream)


def sturdy_streams() -> None:
    """Make this process's standard streams safe to write to. What they cannot encode is spelled out in ASCII."""
    # The first files a run opens would get the numbers of closed streams, and what a library says there end up in them.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    codecs.register_error("slimlm", _in_ascii)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open to the end
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="slimlm")
    if not isinstance(sys.stderr, Lossy):
        sys.stderr = Lossy(sys.stderr)  # type: ignore[assignment]


def to_nowhere(stream: TextIO) -> None:
    """Whatever this stream still holds, or is given, is lost without a word."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(IN_ASCII)
    return text.encode("ascii", "backslashreplace").decode(), error.end
