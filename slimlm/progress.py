"""How long work tells the user where it stands. The library reports; whoever called decides what to show."""

import logging
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Receives stages (with their number of steps), steps, and lines worth keeping."""

    def stage(self, name: str, total: int) -> None: ...

    def step(self, count: int = 1) -> None: ...

    def line(self, text: str) -> None: ...


class LogProgress:
    """Stages and lines go to the log; steps are not shown."""

    def stage(self, name: str, total: int) -> None:
        logger.info("%s", name)

    def step(self, count: int = 1) -> None:
        pass

    def line(self, text: str) -> None:
        logger.info("%s", text)
