"""What commands that take long share: bars, signals, the log, and files of figures."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from slimlm.cli.options import Verbosity
from slimlm.errors import Interrupted
from slimlm.imports import importing
from slimlm.started import own_rank

if TYPE_CHECKING:
    from slimlm.plain import Told
    from slimlm.progress import Progress


USUAL = Verbosity()


class Stopped(BaseException):
    """Ctrl-C, a polite kill, or a terminal that was closed: ends a run. Holds the signal's number."""


@contextmanager
def running(when_interrupted: str = "interrupted", shown: Verbosity = USUAL) -> "Iterator[Progress]":
    """Progress while it runs; signals as an error of our own, whose exit code the shell understands."""
    with _shown(shown.quiet) as progress:
        try:
            progress.stage("starting", 1)  # importing PyTorch takes seconds
            _set_verbosity(shown.verbose and own_rank() == 0)
            yield progress
        except Stopped as error:
            raise Interrupted(when_interrupted, 128 + error.args[0]) from error


def _shown(quiet: bool) -> "AbstractContextManager[Progress]":
    """Of the first of several processes only."""
    if own_rank() == 0 and not quiet:
        from slimlm.report.progress import progress_shown

        return progress_shown()
    from slimlm.progress import Progress

    return nullcontext(Progress())


def _set_verbosity(verbose: bool) -> None:
    if verbose:
        logging.getLogger("slimlm").setLevel(logging.INFO)
    else:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the last failure is ours to tell
        with importing():
            from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def require_there(*names: str | None) -> None:
    """Raises UserError for the first of these that is a path, and of nothing: before PyTorch is imported, which takes
    seconds."""
    from slimlm.checkpoint.kinds import refuse_no_directory

    for name in names:
        if name is not None and "/" in name and not Path(name).expanduser().exists():
            refuse_no_directory(name)


def ready_to_tell(json_path: Path | None) -> None:
    """Raises UserError where figures cannot be written there, before any work."""
    from slimlm.report.results import check_results

    if json_path is not None and own_rank() == 0:
        check_results(json_path)


def tell(data: "Told", json_path: Path | None, show: Callable[[], None]) -> None:
    """Figures are in their file before any are shown, and are shown even where that file cannot be had. On standard
    output, which is `-`, they are all there is."""
    from slimlm.report.results import STANDARD_OUTPUT, as_json, write_results

    if json_path == STANDARD_OUTPUT:
        print(as_json(data))
        return
    try:
        if json_path is not None:
            write_results(json_path, data)
    finally:
        show()
    if json_path is not None:
        print(f"written to {json_path}")
