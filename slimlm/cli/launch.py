"""`--num-processes`: the same command again, in several processes on this machine, by torch's launcher.

That is torchrun's own, which is only half public: all that is used of it is here.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

from slimlm.cli.running import Stopped
from slimlm.errors import Interrupted, UserError
from slimlm.started import LAUNCHED, LOST, environment, is_launched, world_size

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT}  # as the launcher stops them


def in_processes(count: int | None, device: str, advice: str = "") -> bool:
    """Run this command's line in `count` processes, to their end; False where it is to run in this one.

    device: as `--device`. advice: what to do after an interruption, to stand behind it. Raises UserError where that
    cannot be, Interrupted when a signal ended this process or one of them. Whatever else ends one of them, that has
    said so itself, and its exit code is this one's.
    """
    if count is None or is_launched():
        return False
    if world_size() > 1:
        raise UserError(
            f"--num-processes starts processes, and this is one of {world_size()} that run already: leave it out"
        )
    if count == 1:
        return False
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // count))
    quiet = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with environment(**{LAUNCHED: "1", "OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": quiet}):
            _require_gpus(count, device)
            _launch(count, advice)
    except Stopped as error:
        raise Interrupted(f"interrupted{advice}", 128 + error.args[0]) from error
    return True


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _require_gpus(count: int, device: str) -> None:
    import torch

    gpus = torch.cuda.device_count()
    if device == "cuda" and count > gpus:
        raise UserError(f"--num-processes {count} with --device cuda: there are {gpus} GPUs, and each needs its own")


def _launch(count: int, advice: str) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    if hasattr(config, "signals_to_handle"):  # torch 2.6 has no such setting
        config.signals_to_handle = ",".join(_heeded())
    logging.disable(logging.CRITICAL)  # the launcher tells in pages what is one line here
    try:
        elastic_launch(config, sys.executable)("-m", "slimlm", *sys.argv[1:])
    except ChildFailedError as error:
        _end_as(error.failures, advice)
    except SignalException as error:
        raise Interrupted(f"interrupted{advice}", 128 + error.sigval) from error
    finally:
        logging.disable(logging.NOTSET)


def _heeded() -> list[str]:
    """Signals that nobody had ignored, as nohup does."""
    found = {name: getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")}
    return [name for name, number in found.items() if number and signal.getsignal(number) is not signal.SIG_IGN]


def _end_as(failures: "Mapping[int, ProcessFailure]", advice: str) -> None:
    """What the processes ended with, by rank, as an error of this one."""
    rank, code = blamed({rank: failure.exitcode for rank, failure in failures.items()})
    if code == LOST:
        raise Interrupted(f"rank {rank} lost contact with the others{advice}", LOST)
    if code in STOPPED or code < 0:
        number = -code if code < 0 else code - 128
        raise Interrupted(f"rank {rank} was killed by {_signal_name(number)}{advice}", 128 + number)
    sys.exit(code)


def blamed(codes: Mapping[int, int]) -> tuple[int, int]:
    """The rank, and its exit code, that ended all of them, by their exit codes, those seen first before others: not one
    that missed it, nor one that was stopped because of it, as long as there is another."""
    return min(codes.items(), key=lambda one: (one[1] == LOST, one[1] in STOPPED))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
