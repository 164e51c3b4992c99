"""One run at a time: a file lock, or where the file system has none a file that its owner keeps alive.

Network file systems may be mounted without locks (NFS without a lock daemon, Lustre without `-o flock`), and Windows
has no `flock`. There the owner is whoever makes the file `owner` first; it touches the file while it lives, and one
that was not touched for STALE seconds, or whose process is gone from this machine, is nobody's.
"""

import errno
import json
import os
import platform
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType

import psutil

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME, OWNER_NAME = "lock", "owner"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
HEARTBEAT = 20.0  # seconds between two signs of life
STALE = 300.0  # seconds without one after which an owner is taken for dead


class Taken(Exception):
    """Somebody else holds the lock; the message says who, as far as that is known."""


class Gone(Exception):
    """Whoever held the lock before removed it with everything else."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory`, which exists, inside the context. Raises Taken or Gone at once, OSError where it cannot be."""
    path = directory / LOCK_NAME
    with ExitStack() as stack:
        if fcntl is None:
            stack.enter_context(_owned(directory / OWNER_NAME))
        else:
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, lock)
            if not _flock(lock, path):
                stack.enter_context(_owned(directory / OWNER_NAME))
            if not _is_current(lock, path):
                raise Gone
        yield


def _flock(lock: int, path: Path) -> bool:
    """Take the lock; False where the file system has none."""
    assert fcntl is not None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Taken(f"it holds {path}") from error
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _is_current(lock: int, path: Path) -> bool:
    """Whether the lock we hold is still the one at `path`; the run that held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _owned(path: Path) -> Iterator[None]:
    mine = _claim(path)
    over = threading.Event()
    alive = threading.Thread(target=_stay_alive, args=(path, over), name="heartbeat", daemon=True)
    alive.start()
    try:
        yield
    finally:
        over.set()
        alive.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _claim(path: Path) -> str:
    """What the file says now that it is ours. Raises Taken."""
    mine = json.dumps({"host": platform.node(), "pid": os.getpid(), "id": uuid.uuid4().hex})
    for _ in range(2):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(mine)
            return mine
        except FileExistsError:
            found = _read(path)
            if not _is_dead(path, found):
                break
            _put_away(path, found)
    raise Taken(f"{path} says {_read(path)}")


def _put_away(path: Path, found: str) -> None:
    """Remove a dead owner's file, unless somebody else has meanwhile, and made one of their own."""
    away = path.with_name(f"{OWNER_NAME}.{uuid.uuid4().hex}")
    try:
        path.rename(away)
    except FileNotFoundError:
        return
    if _read(away) != found:
        with suppress(FileExistsError):
            os.link(away, path)  # a live one's: back with it
    away.unlink()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _is_dead(path: Path, found: str) -> bool:
    """Whether an owner is gone: from this machine, or for too long by the file system's own clock."""
    try:
        who = json.loads(found)
        if who["host"] == platform.node() and not psutil.pid_exists(who["pid"]):
            return True
    except (ValueError, KeyError, TypeError):
        who = None  # it died before it had written who it is, or is about to
    now = path.with_name(f"{OWNER_NAME}.{uuid.uuid4().hex}")
    now.touch()
    try:
        age = now.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return True
    finally:
        now.unlink()
    return age > STALE


def _stay_alive(path: Path, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT):
        try:
            os.utime(path)
        except FileNotFoundError:
            return  # the run removed it with everything else
        except OSError:
            continue  # a network that comes back
