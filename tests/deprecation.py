"""Who uses what a library will remove: warnings and transformers' log, traced to the code that made the call.

Python's warnings name a file by counting frames, which decorators lead astray, and transformers says many things to its
log alone, once per process, and not when its verbosity is low. Here the stack decides: the innermost frame that belongs
neither to the library that speaks nor to what merely passes calls on.
"""

import logging
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers.utils import logging as transformers_logging

KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
WORDS = ("deprecat", "will be removed", "will no longer")
ROOT = Path(__file__).parents[1]
PACKAGES = Path(sysconfig.get_path("purelib"))
OURS = "slimlm"
PASSES_ON = ("torch",)  # Module.__call__


class Deprecations(logging.Handler):
    """`ours`: what slimlm and its tests were told not to use, each with the line that does; a test takes it away.

    `ever`: all of it.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.ours: list[str] = []
        self.ever: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if any(word in record.getMessage().lower() for word in WORDS):
            self._note(record.getMessage())

    def warned(self, message: Any, category: type[Warning], *where: Any) -> None:
        """In the place of `warnings.showwarning`."""
        if issubclass(category, KINDS):
            self._note(str(message))

    def _note(self, message: str) -> None:
        line = _caller(sys._getframe(1))
        if line is not None:
            self.ours.append(f"{line}: {message}")
            self.ever.append(self.ours[-1])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what is said is heard, however often and however quiet transformers was told to be."""
        logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
        logger, silence = logging.getLogger("transformers"), transformers_logging.set_verbosity_error
        logger.setLevel(logging.WARNING)
        logger.addHandler(self)
        transformers_logging.set_verbosity_error = lambda: None
        before, warnings.showwarning = warnings.showwarning, self.warned
        try:
            yield
        finally:
            warnings.showwarning = before
            transformers_logging.set_verbosity_error = silence
            logger.removeHandler(self)


HEARD = Deprecations()  # in the test that runs now


def _caller(frame: FrameType | None) -> str | None:
    """The line of ours that the speaker was called from, or None where another library called it."""
    speaker = None
    while frame is not None:
        owner = _owner(frame)
        if owner is not None and speaker is None and frame.f_code.co_filename != __file__:
            speaker = owner
        elif owner is not None and owner not in (speaker, *PASSES_ON) and speaker is not None:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}" if owner == OURS else None
        frame = frame.f_back
    return None


def _owner(frame: FrameType) -> str | None:
    """The package a frame's code is from; None for Python's own and for code without a file."""
    path = Path(frame.f_code.co_filename)
    if path.is_relative_to(PACKAGES):
        return path.relative_to(PACKAGES).parts[0]
    mine = path.is_relative_to(ROOT) or "transformers_modules" in path.parts  # where transformers copies our classes
    return OURS if mine else None
