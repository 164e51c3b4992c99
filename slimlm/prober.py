"""The process that a dry run probes in, started while the one that asks is still importing."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from slimlm.errors import RunFailure
from slimlm.plain import Json

START = """
from slimlm.imports import importing

with importing():
    from slimlm.probe import main
main()
"""


class Asked(NamedTuple):
    """A recipe's file, the directory where hidden states wait, whether its model's code is trusted, and how many bytes
    of hidden states may wait in memory."""

    recipe: str
    work_dir: str | None = None
    trusted: bool = False
    stream_memory: int | None = None


class Prober:
    """Runs slimlm/probe.py, which imports at once, and then waits for what is asked of it.

    Its standard input is a pipe that stays open: a line says what directories are its own, the next what is asked. When
    this process dies, even by `kill -9`, the pipe ends, and so does the probe, which takes its directories along.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-c", START]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def owns(self, places: Sequence[Path]) -> None:
        """Have it take directories along, should this process die."""
        self._say([str(place) for place in places])

    def carry_out(self, asked: Asked) -> None:
        """Returns when it is done. Raises RunFailure when it failed."""
        try:
            said = self._answer(asked)
        finally:
            self._process.kill()  # before anybody clears away what it writes
            code = self._process.wait()
        if code < 0:
            raise RunFailure(
                f"the probe of the first blocks was killed by signal {-code}, probably for want of memory: "
                "lower --batch-size or --max-seq-length"
            )
        if code != 0:
            raise RunFailure(f"the probe of the first blocks failed: {said[-1]}")

    def _answer(self, asked: Asked) -> list[str]:
        """The lines of its complaints."""
        self._say(asked)
        assert self._process.stderr is not None
        said = self._process.stderr.read()
        self._process.wait()
        return said.strip().splitlines() or ["it does not say why"]

    def _say(self, what: Sequence[Json]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # where it has died, of which it says something
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
