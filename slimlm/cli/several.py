"""How a command begins and ends as one of several processes: it speaks for all or not at all, and none hangs."""

import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from threading import Thread
from typing import NoReturn

from slimlm.cli.running import Stopped
from slimlm.started import LOST, is_launched, own_rank

ENDING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP
BLAME = 2.5  # seconds in which who failed ends before those that lost it, so that it is seen to be the one
STUCK = 4.0  # seconds after a signal in which Python has to have noticed


def begin_as_one_of_several() -> None:
    """Have signals end this process even where it waits for others inside a library, which Python's own do not; and
    have it end with the process that launched it."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # sockets that close tell nothing that we do not
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    Thread(target=_watch, args=(reading, writing, os.getppid()), daemon=True).start()


def _watch(reading: socket.socket, writing: socket.socket, parent: int) -> None:
    """writing: is kept open by being here."""
    reading.settimeout(1)
    while True:
        try:
            number = reading.recv(1)[0]
        except TimeoutError:
            if is_launched() and os.getppid() != parent:
                os._exit(LOST)
            continue
        if number in ENDING:
            time.sleep(STUCK)
            os._exit(128 + number)


def end_as_one_of_several(message: str, code: int) -> NoReturn:
    """Say why, unless another process does, and leave at once: what is left of a group would wait for the others.

    message: a line, or nothing for the traceback of the error at hand.
    """
    try:
        if code == LOST:
            with suppress(Stopped):
                time.sleep(BLAME)
        parent_says = is_launched() and (code == LOST or code - 128 in ENDING)
        if not parent_says and _may_speak():
            if message:
                print(f"slimlm: rank {own_rank()}: {message}", file=sys.stderr)
            else:
                traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _may_speak() -> bool:
    from slimlm.meeting import may_speak

    return may_speak()
