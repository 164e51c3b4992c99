"""The output directory: built beside its final name, locked while in use, moved there in one step when whole."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimlm.errors import UserError

LOCK_NAME = ".slimlm.lock"
# Tokenizer, chat template, generation settings and licence travel with the weights, byte for byte.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def check_output(output: Path, overwrite: bool, source: Path, needed_bytes: int = 0) -> None:
    """Raises UserError when a checkpoint cannot be put at `output`: taken, not writable, not on a large enough disk."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} exists and is not a directory")
    if output.resolve() == source.resolve():
        raise UserError(f"output {output} is the input model's own directory: choose another --output-dir")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"output directory {output} is not empty: pass --overwrite to replace it, or choose another")
    home = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        os.rmdir(
            tempfile.mkdtemp(prefix=".slimlm-", dir=home)
        )  # permissions and mount flags do not tell the truth to root
    except OSError as error:
        raise UserError(f"output directory {output} cannot be created in {home}: {error.strerror}") from error
    free = shutil.disk_usage(home).free
    if free < needed_bytes:
        raise UserError(
            f"output {output} needs {needed_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: "
            "free some space or choose another --output-dir"
        )


@contextmanager
def staged_output(output: Path, overwrite: bool) -> Iterator[Path]:
    """A fresh `<output>.partial/` to write into; renamed to `output` at the end, removed if anything goes wrong.

    Raises UserError when another run holds it.
    """
    partial = partial_path(output)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial / LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(f"output directory {output} cannot be created: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another slimlm run is writing {output} (it holds {partial / LOCK_NAME})") from error
        try:
            _empty(partial)
            yield partial
            _publish(partial, output, overwrite)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _empty(partial: Path) -> None:
    """Clear what a killed run left behind."""
    for entry in partial.iterdir():
        if entry.name == LOCK_NAME:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _publish(partial: Path, output: Path, overwrite: bool) -> None:
    (partial / LOCK_NAME).unlink()
    replaced = output.with_name(output.name + ".replaced")
    if output.exists() and overwrite:
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
    try:
        partial.rename(output)
    except OSError as error:
        if replaced.exists():
            replaced.rename(output)
        raise UserError(f"output directory {output} was filled by something else meanwhile") from error
    shutil.rmtree(replaced, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence files."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")
