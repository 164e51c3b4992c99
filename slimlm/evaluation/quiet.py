"""Keeps lm-eval off the screen: what it always says of how slimlm calls it, its bars, and what it asks the machine.

Only in the thread that asks for it: to others, who may use lm-eval too, it is as it was.
"""

import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

from slimlm.progress import Switch

# Said at every call, of models that are in memory already and of tasks that come with slimlm.
KNOWN = (
    "Custom kwargs can be passed to `--metadata`",
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
)
# By a `git` that complains outside a repository, and by all that the machine says of itself; we use neither.
DESCRIBING = ("get_git_commit_hash", "add_env_info")
SPEAKERS = ("lm_eval.api.task", "lm_eval.models.huggingface")
Made = TypeVar("Made")
_here = threading.local()
_hushing = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, this thread's calls of lm-eval show nothing but warnings that mean something."""
    import datasets

    switch = _bars_of_datasets(datasets)
    with _hushing:
        _hush()
    _here.quiet = True
    try:
        with switch.off():
            yield
    finally:
        _here.quiet = False


@functools.cache
def _bars_of_datasets(datasets: ModuleType) -> Switch:
    return Switch(
        lambda: not datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars
    )


def _is_quiet() -> bool:
    return getattr(_here, "quiet", False)


def _hush() -> None:
    """Have lm-eval ask whether the thread it runs in is quiet. Once is enough."""
    import lm_eval.evaluator
    import lm_eval.models.huggingface

    for speaker in SPEAKERS:
        logging.getLogger(speaker).addFilter(_is_news)  # the same filter is not added twice
    for name, module in list(sys.modules.items()):
        bar = getattr(module, "tqdm", None) if name.startswith("lm_eval.") else None
        if isinstance(bar, type):
            module.tqdm = _at_will(bar)  # type: ignore[attr-defined]
    for name in DESCRIBING:
        describe = getattr(lm_eval.evaluator, name, None)
        if describe is not None and not hasattr(describe, "__wrapped__"):
            setattr(lm_eval.evaluator, name, _unless_quiet(describe))


def _is_news(record: logging.LogRecord) -> bool:
    return not (_is_quiet() and any(words in record.getMessage() for words in KNOWN))


def _at_will(bar: Callable[..., Made]) -> Callable[..., Made]:
    @functools.wraps(bar, updated=())
    def made(*args: Any, **kwargs: Any) -> Made:
        return bar(*args, **kwargs | ({"disable": True} if _is_quiet() else {}))

    return made


def _unless_quiet(describe: Callable[..., Made]) -> Callable[..., Made | None]:
    @functools.wraps(describe)
    def described(*args: Any) -> Made | None:
        return None if _is_quiet() else describe(*args)

    return described
