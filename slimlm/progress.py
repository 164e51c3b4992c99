"""How long work tells the user where it stands. The library reports; whoever called decides what to show."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


class Progress:
    """Receives stages (with their number of steps), steps, and lines worth keeping. Shows nothing by itself.

    log: a file that gets one JSON object per finished part: time, what, part, seconds, memory, and what else is known.
    """

    log: Path | None = None

    def expect(self, parts: Sequence[Mapping[str, float]]) -> None:
        """All that is to come: parts one after another, and what each of their stages costs, in any unit."""

    def part(self, number: int) -> None:
        """A part of what was expected begins, counted from 0."""

    def stage(self, name: str, total: int, first: int = 0) -> None:
        """A new stage begins, `first` of whose steps were done before."""

    def step(self, count: int = 1) -> None:
        """So many of the stage's steps are done."""

    def line(self, text: str) -> None:
        """Something worth a line."""

    def detail(self, text: str) -> None:
        """A line for whoever wants to see all of it."""
        self.line(text)

    def done(self, what: str, part: str, seconds: float, **facts: float) -> None:
        """A part of the model went through a stage."""
        memory = resident_memory()
        more = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in facts.items())
        self.detail(f"{part}  {what} in {seconds:.1f} s{more}, memory {memory / 1e9:.2f} GB")
        if self.log is not None:
            event = {"time": time.time(), "what": what, "part": part, "seconds": seconds, "memory": memory, **facts}
            try:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(event) + "\n")
            except OSError as error:  # a run is worth more than its log
                logger.warning("the log %s ends here: %s", self.log, error.strerror)
                self.log = None


@dataclass(eq=False)
class Switch:
    """A library's one switch for all threads: off while anybody wants it off, then as it was before the first did."""

    is_on: Callable[[], bool]
    turn_off: Callable[[], None]
    turn_on: Callable[[], None]
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    was_on: bool = False

    @contextmanager
    def off(self) -> Iterator[None]:
        with self.lock:
            if self.users == 0:
                self.was_on = self.is_on()
            self.users += 1
            self.turn_off()
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0 and self.was_on:
                    self.turn_on()


class LogProgress(Progress):
    """Stages and lines go to the log; steps are not shown."""

    def stage(self, name: str, total: int, first: int = 0) -> None:
        logger.info("%s", name)

    def line(self, text: str) -> None:
        logger.info("%s", text)
