"""What torchrun, accelerate launch and `--num-processes` tell each process they start, in its environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

LAUNCHED = "SLIMLM_LAUNCHED"  # set by `--num-processes`, whose parent says which process was killed
LOST = 75  # exit code, EX_TEMPFAIL, of a process whose peers are gone: it is not to blame


def world_size() -> int:
    """Processes of this run."""
    return max(1, _number("WORLD_SIZE", 1))


def own_rank() -> int:
    """Which of them this one is; 0 of one."""
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Which of those on its machine."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


def local_size() -> int:
    """Processes on its machine; all of them where nobody says."""
    return _number("LOCAL_WORLD_SIZE", world_size())


def is_launched() -> bool:
    """Whether slimlm itself started it."""
    return bool(os.environ.get(LAUNCHED))


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Inside, these variables have these values, also for processes that start there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default
