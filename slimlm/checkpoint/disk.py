"""What can go wrong with a disk, and making sure that what was written is on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimlm.errors import RunFailure


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises RunFailure, one line that names the file, for the system's word for a full or failing disk."""
    try:
        yield
    except OSError as error:
        raise RunFailure(f"cannot write {path}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the disk itself. Raises RunFailure when they cannot be."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, data: str | bytes) -> None:
    """A file that has all of the data or is as it was before, whatever happens. Raises RunFailure on a full disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
