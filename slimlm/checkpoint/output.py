"""The output directory: built beside its final name, locked while in use, moved there in one step when whole.

`<output>.partial/` holds `model/`, which becomes the output, `work/`, from which a run can be resumed, and `stages/`,
what the earlier of several runs gave. Nothing else beside the output is ever touched.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from slimlm.checkpoint.companions import COMPANIONS
from slimlm.checkpoint.disk import disk_errors, sync, write_whole
from slimlm.checkpoint.journal import finished_steps, is_complete
from slimlm.checkpoint.lock import LOCK_NAME, OWNER_NAME, Gone, Taken, locked
from slimlm.checkpoint.manifest import MANIFEST_NAME
from slimlm.checkpoint.staging import Staging, require_our_staging, require_ours
from slimlm.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def staged_output(
    output: Path, overwrite: bool = False, resume: bool = False, work_dir: Path | None = None
) -> Iterator[Staging]:
    """A locked `<output>.partial/` to build in; `model/` is renamed to `output` at the end and the rest removed.

    Without `resume` it starts empty, and what an interrupted run had done is said before it goes. Whatever goes wrong,
    the output's name is untouched, and what was built stays where it is for another run to resume. Raises UserError
    when another run holds it, or what is there cannot be removed.
    """
    staging = Staging(output, work_dir)
    with _held(staging):
        if staging.replaced.exists() and not output.exists():
            staging.replaced.rename(output)  # a run died between taking the old output away and putting the new one
        if not resume:
            _start_over(staging)
        elif staging.elsewhere is not None:
            staging = _where_it_was(staging, staging.elsewhere)
        for path in (staging.model, staging.work, staging.scratch):
            path.mkdir(exist_ok=True)
        if staging.work_dir is not None:
            write_whole(staging.note, str(staging.scratch))
        yield staging
        _publish(staging, overwrite)


def _where_it_was(staging: Staging, before: Path) -> Staging:
    """The place with the hidden states where the interrupted run had them, unless they are to be elsewhere now."""
    if staging.work_dir is None:
        return replace(staging, work_dir=before.parent) if before.parent.is_dir() else staging
    if before != staging.scratch:
        logger.warning("hidden states wait in %s from now on: those in %s are computed again", staging.scratch, before)
        _delete(before)
    return staging


def unfinished(staging: Staging) -> tuple[int, int]:
    """What an interrupted run left here: finished steps, and finished runs of several. (0, 0) where there is nothing
    to lose, as beside a result that has its name already."""
    stages = sorted(staging.stages.iterdir()) if staging.stages.is_dir() else []
    steps = [finished_steps(place / "work") for place in (staging.root, *stages)]
    runs = len([stage for stage in stages if (stage / MANIFEST_NAME).is_file()])
    published = is_complete(staging.work) and not staging.model.exists()
    return (0, 0) if published else (sum(steps), runs)


def _start_over(staging: Staging) -> None:
    """Clear what an interrupted run left; what is lost by that is said first."""
    steps, runs = unfinished(staging)
    if steps or runs:
        done = f"{steps} finished steps" + (f" and {runs} finished runs" if runs else "")
        logger.warning("discarding %s in %s: --resume would have gone on from there", done, staging.root)
    for path in _parts(staging):
        _delete(path)


def _parts(staging: Staging) -> list[Path]:
    """Everything but the old output and the locks; the journal goes last, as it says what the rest is."""
    elsewhere = [staging.elsewhere] if staging.elsewhere else []
    return list(dict.fromkeys([staging.stages, *elsewhere, staging.scratch, staging.model, staging.work]))


def _delete(path: Path) -> None:
    """Raises UserError naming what cannot be deleted."""
    try:
        if os.path.lexists(path):
            shutil.rmtree(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{error.filename or path} cannot be deleted: {reason}; delete it yourself") from error


@contextmanager
def held(output: Path, work_dir: Path | None = None) -> Iterator[Staging]:
    """The locked place beside a finished output, empty, and gone afterwards.

    Raises UserError when a run is at work there, or another one was interrupted.
    """
    staging = Staging(output, work_dir)
    with _held(staging):
        if any(unfinished(staging)):
            raise UserError(f"{staging.root} holds an interrupted run of another kind: finish it, or remove it")
        _start_over(staging)
        for path in (staging.work, staging.scratch):
            path.mkdir(exist_ok=True)
        try:
            yield staging
        finally:
            _remove(staging)


def clear_leftovers(output: Path, work_dir: Path | None = None) -> None:
    """Remove what a run that finished did not come to remove; what another one left to be resumed stays.

    Raises UserError when another run is at work there.
    """
    staging = Staging(output)
    if not staging.root.exists():
        return
    if any(unfinished(staging)):
        logger.warning("%s holds an interrupted run of another kind: it is left alone", staging.root)
        return
    with held(output, work_dir):
        pass


@contextmanager
def _held(staging: Staging) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            require_our_staging(staging.root)
            staging.output.parent.mkdir(parents=True, exist_ok=True)
            staging.root.mkdir(mode=0o700, exist_ok=True)
            stack.callback(_remove_root, staging.root)
            stack.enter_context(locked(staging.root))
        except Taken as error:
            raise UserError(f"another slimlm run is writing {staging.output} ({error})") from error
        except Gone as error:
            raise UserError(f"another slimlm run has just finished writing {staging.output}") from error
        except OSError as error:
            raise UserError(f"output directory {staging.output} cannot be created: {error.strerror}") from error
        yield


def _remove_root(root: Path) -> None:
    """Once everything in it is removed and the lock is let go of: NFS keeps a removed file as long as it is open."""
    with suppress(OSError):  # somebody else's lock, or work to resume, is in it
        root.rmdir()


def _remove(staging: Staging) -> None:
    """The lock goes last, so that whatever is left of the directory is still known as ours."""
    for path in (staging.replaced, *_parts(staging)):
        try:
            _delete(path)
        except UserError as error:
            logger.warning("%s; the result is whole, at %s", error, staging.output)
    for path in (*staging.root.glob(f"{OWNER_NAME}*"), staging.note, staging.root / LOCK_NAME):
        path.unlink(missing_ok=True)
    _remove_root(staging.root)


def _publish(staging: Staging, overwrite: bool) -> None:
    output = staging.output
    for path in (*staging.model.rglob("*"), staging.model):
        sync(path)
    try:
        if overwrite and output.exists():
            require_ours(output)
            _delete(staging.replaced)
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


def companions(source: Path) -> list[Path]:
    """The files that travel with a checkpoint's weights, each once."""
    return sorted({file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()})


def _copy_companions(source: Path, target: Path) -> None:
    for file in companions(source):
        shutil.copyfile(file, target / file.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates", dirs_exist_ok=True)
