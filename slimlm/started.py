"""What torchrun, accelerate launch and `--num-processes` tell each process they start, in its environment."""

import os

LAUNCHED = "SLIMLM_LAUNCHED"  # set by `--num-processes`, whose parent says of every killed process that it was


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


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default
