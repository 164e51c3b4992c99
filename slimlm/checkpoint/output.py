"""The output directory: built beside its final name, locked while in use, moved there in one step when whole.

`<output>.partial/` holds `model/`, which becomes the output, and `work/`, from which a run can be resumed.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slimlm.checkpoint.disk import disk_errors, sync
from slimlm.checkpoint.manifest import MANIFEST_NAME
from slimlm.errors import UserError

LOCK_NAME = "lock"
OUR_NAMES = {LOCK_NAME, "model", "work", "replaced"}
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


@dataclass(frozen=True)
class Staging:
    """The place beside `output` where it is built."""

    output: Path

    @property
    def root(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def replaced(self) -> Path:
        return self.root / "replaced"


def check_output(output: Path, overwrite: bool, inputs: Iterable[Path], needed_bytes: int = 0) -> None:
    """Raises UserError when a checkpoint cannot be put at `output`: taken, not writable, not on a large enough disk.

    `inputs` are never overwritten, nor is a directory that slimlm did not write.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} exists and is not a directory")
    for path in inputs:
        if path.resolve().is_relative_to(output.resolve()):
            raise UserError(f"output {output} is or holds an input of this run, {path}: choose another --output-dir")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise UserError(
                f"output directory {output} is not empty: choose another, or pass --overwrite to replace it"
            )
        _require_ours(output)
    root = Staging(output).root
    if root.exists() and not (root.is_dir() and {path.name for path in root.iterdir()} <= OUR_NAMES):
        raise UserError(f"{root} is in the way and was not made by slimlm: move it, or choose another --output-dir")
    home = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        # Permissions and mount flags do not tell the truth to root; trying does.
        os.rmdir(tempfile.mkdtemp(prefix=".slimlm-", dir=home))
    except OSError as error:
        raise UserError(f"output directory {output} cannot be created in {home}: {error.strerror}") from error
    # What an earlier run left is either taken over or cleared.
    free = shutil.disk_usage(home).free + sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    if free < needed_bytes:
        raise UserError(
            f"output {output} needs {needed_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: "
            "free some space or choose another --output-dir"
        )


def _require_ours(output: Path) -> None:
    if any(output.iterdir()) and not (output / MANIFEST_NAME).is_file():
        raise UserError(f"output directory {output} holds something slimlm did not write: choose another")


@contextmanager
def staged_output(output: Path, overwrite: bool = False, resume: bool = False) -> Iterator[Staging]:
    """A locked `<output>.partial/` to build in; `model/` is renamed to `output` at the end and the rest removed.

    Without `resume` it starts empty. Whatever goes wrong, the output's name is untouched, and what was built stays
    where it is for another run to resume. Raises UserError when another run holds it.
    """
    staging = Staging(output)
    with _locked(staging):
        if staging.replaced.exists() and not output.exists():
            staging.replaced.rename(output)  # a run died between taking the old output away and putting the new one
        if not resume:
            shutil.rmtree(staging.model, ignore_errors=True)
            shutil.rmtree(staging.work, ignore_errors=True)
        staging.model.mkdir(exist_ok=True)
        staging.work.mkdir(exist_ok=True)
        yield staging
        _publish(staging, overwrite)


def clear_leftovers(output: Path) -> None:
    """Remove what a run that finished did not come to remove. Raises UserError when another run is at work there."""
    staging = Staging(output)
    if staging.root.exists():
        with _locked(staging):
            _remove(staging)


@contextmanager
def _locked(staging: Staging) -> Iterator[None]:
    try:
        staging.root.mkdir(parents=True, exist_ok=True)
        lock = os.open(staging.root / LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UserError(f"output directory {staging.output} cannot be created: {error.strerror}") from error
    try:
        _take(lock, staging)
        yield
    finally:
        os.close(lock)


def _take(lock: int, staging: Staging) -> None:
    path = staging.root / LOCK_NAME
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another slimlm run is writing {staging.output} (it holds {path})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be locked: {error.strerror}") from error
    if not _is_current(lock, path):
        raise UserError(f"another slimlm run has just finished writing {staging.output}")


def _remove(staging: Staging) -> None:
    """The lock goes last, so that whatever is left of the directory is still known as ours."""
    for path in (staging.replaced, staging.work, staging.model):
        shutil.rmtree(path, ignore_errors=True)
    (staging.root / LOCK_NAME).unlink(missing_ok=True)
    staging.root.rmdir()


def _is_current(lock: int, path: Path) -> bool:
    """Whether the lock we hold is still the one at `path`; the run that held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _publish(staging: Staging, overwrite: bool) -> None:
    output = staging.output
    for path in (*staging.model.rglob("*"), staging.model):
        sync(path)
    try:
        if overwrite and output.exists():
            _require_ours(output)
            shutil.rmtree(staging.replaced, ignore_errors=True)
            output.rename(staging.replaced)
        staging.model.rename(output)
    except BaseException as error:
        if staging.replaced.exists() and not output.exists():
            staging.replaced.rename(output)
        if isinstance(error, OSError):
            raise UserError(f"output {output} cannot take its name: {error.strerror}; resume with --resume") from error
        raise
    sync(output.parent)
    _remove(staging)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence files. Raises RunFailure when the disk is full."""
    with disk_errors(target):
        _copy_companions(source, target)


def _copy_companions(source: Path, target: Path) -> None:
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates", dirs_exist_ok=True)
