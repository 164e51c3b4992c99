"""Figures as a JSON file: the whole of them or nothing."""

import json
import os
import shutil
import uuid
from pathlib import Path

from slimlm.errors import RunFailure, UserError
from slimlm.plain import Told

STANDARD_OUTPUT = Path("-")


def check_results(path: Path) -> None:
    """Find out before hours of work whether their result can be kept; leaves nothing. Raises UserError."""
    if path == STANDARD_OUTPUT:
        return
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(0, "it may not be written")
        if _in_one_step(path):
            _part(path).unlink()
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}") from error


def as_json(data: Told) -> str:
    """For people, too."""
    return json.dumps(data, indent=2)


def write_results(path: Path, data: Told) -> None:
    """Write JSON; an earlier file stays until this one is whole. Raises RunFailure naming the file."""
    text = as_json(data) + "\n"
    try:
        if not _in_one_step(path):
            path.write_text(text, encoding="utf-8")
            return
        part = _part(path)
        try:
            part.write_text(text, encoding="utf-8")
            _rename(part, path.resolve())
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise RunFailure(f"cannot write {path}: {error.strerror or error}") from error


def _in_one_step(path: Path) -> bool:
    """Not for /dev/stdout and other things that are no files."""
    return (
        not path.is_relative_to("/dev") and not path.is_relative_to("/proc") and (path.is_file() or not path.exists())
    )


def _part(path: Path) -> Path:
    """An empty file of our own beside the path, or beside what it leads to, which is what is replaced."""
    target = path.resolve()
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    part.open("x").close()
    return part


def _rename(part: Path, target: Path) -> None:
    try:
        part.replace(target)
    except OSError:  # a file that is a mount point, as containers make them, keeps its place
        shutil.copyfile(part, target)
