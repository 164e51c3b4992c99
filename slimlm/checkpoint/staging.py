"""Where an output is built, and everything that can be found wrong with the place before any work."""

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slimlm.checkpoint.lock import LOCK_NAME, OWNER_NAME
from slimlm.checkpoint.manifest import MANIFEST_NAME
from slimlm.errors import UserError

OUR_FILES = (LOCK_NAME, OWNER_NAME, "elsewhere")
OUR_DIRECTORIES = ("model", "work", "stages", "replaced")


@dataclass(frozen=True)
class Staging:
    """The place beside `output` where it is built. work_dir: where files that only wait are to be, if not there."""

    output: Path
    work_dir: Path | None = None

    @property
    def root(self) -> Path:
        """Where all of it is until it is whole."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def model(self) -> Path:
        """The checkpoint that is being written."""
        return self.root / "model"

    @property
    def work(self) -> Path:
        """The journal, and what finished steps gave."""
        return self.root / "work"

    @property
    def stages(self) -> Path:
        """What the earlier of several runs gave."""
        return self.root / "stages"

    @property
    def replaced(self) -> Path:
        """What was at the output before, until the result is there."""
        return self.root / "replaced"

    @property
    def scratch(self) -> Path:
        """Where hidden states wait: a directory of this output's own."""
        return self.work if self.work_dir is None else self.work_dir / self._own_name

    @property
    def _own_name(self) -> str:
        digest = hashlib.sha256(os.fsencode(self.output)).hexdigest()[:12]
        return f"slimlm-{self.output.name[:100]}-{digest}"

    @property
    def note(self) -> Path:
        """The file that says where hidden states wait, if not in `work`."""
        return self.root / "elsewhere"

    @property
    def elsewhere(self) -> Path | None:
        """Where the run that left off here had its hidden states, if not in `work`."""
        try:
            noted = Path(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return noted if noted.is_absolute() and noted.name == self._own_name and not noted.is_symlink() else None


def check_output(output: Path, overwrite: bool, inputs: Iterable[Path], work_dir: Path | None = None) -> None:
    """Raises UserError when a checkpoint cannot be put at `output`, or what waits into `work_dir`: taken, not writable.

    `inputs` are never overwritten, nor is a directory that slimlm did not write.
    """
    staging = Staging(output, work_dir)
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
        require_ours(output)
    owner = _try_writing(_home(output), f"output directory {output}")
    _require_renamable(staging)
    require_our_staging(staging.root, owner)
    if work_dir is not None:
        if not work_dir.is_dir():
            raise UserError(f"--work-dir {work_dir} {'is not a directory' if work_dir.exists() else 'does not exist'}")
        _require_real(staging.scratch, _try_writing(work_dir, "--work-dir: files"))


def check_space(
    output: Path, needed_bytes: int, work_dir: Path | None = None, scratch_bytes: int = 0, resume: bool = False
) -> None:
    """Raises UserError when the disk is too small for a checkpoint at `output`.

    needed_bytes: of the result; scratch_bytes: of what waits in files meanwhile, beside it or in `work_dir`. resume:
    whether what earlier runs of several gave stays.
    """
    staging = Staging(output, work_dir)
    home = _home(output)
    # What an earlier run left there is either taken over or cleared.
    left = {staging.model, staging.replaced, *([] if resume else [staging.work, staging.stages])} - {staging.scratch}
    needs = [(home, needed_bytes - sum(map(size_of, left)))]
    _require_space(output, [*needs, (work_dir or home, scratch_bytes - size_of(staging.scratch))])


def _home(output: Path) -> Path:
    """What is there already of the way to it."""
    return next(parent for parent in output.absolute().parents if parent.exists())


def _try_writing(home: Path, what: str) -> int | None:
    """Permissions and mount flags do not tell the truth to root; trying does. The owner that new files get there."""
    try:
        probe = tempfile.mkdtemp(prefix=".slimlm-", dir=home)
        owner = os.lstat(probe).st_uid
        os.rmdir(probe)
    except OSError as error:
        raise UserError(f"{what} cannot be created in {home}: {error.strerror}") from error
    return owner if hasattr(os, "getuid") else None


def _require_renamable(staging: Staging) -> None:
    """Raises UserError where the last step, giving the result its name, could not be taken: found before the work."""
    for path in (staging.output, staging.root):
        if is_mount_point(path):
            raise UserError(
                f"{path} is a mount point, whose place a finished result cannot take: choose a directory in it, such "
                f"as --output-dir {staging.output / 'model'}"
            )


def is_mount_point(path: Path) -> bool:
    """Also one of the same file system (`mount --bind`), which `os.path.ismount` does not see."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # no Linux
        return False
    return _escaped(os.path.realpath(path)) in {line.split()[4] for line in lines}


def _escaped(path: str) -> str:
    """A path as mountinfo has it."""
    for character in "\\ \t\n":
        path = path.replace(character, f"\\{ord(character):03o}")
    return path


def require_our_staging(root: Path, owner: int | None = None) -> None:
    """Raises UserError where what is to be written would land elsewhere, or on somebody's files.

    owner: of whom everything there must be, where that is known.
    """
    if not os.path.lexists(root):
        return
    _require_real(root, owner)
    for path in root.iterdir():
        if not (path.name in OUR_DIRECTORIES or is_our_file(path.name)):
            raise UserError(f"{root} is in the way and was not made by slimlm: move it, or choose another --output-dir")
        _require_real(path, owner)


def is_our_file(name: str) -> bool:
    """Whether slimlm gives files in its directories such a name."""
    return name in OUR_FILES or name.startswith(f"{OWNER_NAME}.")


def _require_real(path: Path, owner: int | None) -> None:
    """Raises UserError for what somebody may have put there to have slimlm write elsewhere: a link, or theirs."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(found.st_mode):
        raise UserError(f"{path} is a link to {os.readlink(path)}, which slimlm did not make: remove it")
    if not stat.S_ISDIR(found.st_mode) and not is_our_file(path.name):
        raise UserError(f"{path} is in the way and was not made by slimlm: move it, or choose another --output-dir")
    if owner is not None and found.st_uid != owner:
        raise UserError(f"{path} belongs to another user (uid {found.st_uid}): choose another --output-dir")


def _require_space(output: Path, needs: list[tuple[Path, int]]) -> None:
    """Raises UserError where a disk has less free than all that is still to go there: [(place, bytes)]."""
    by_disk: dict[int, list[tuple[Path, int]]] = {}
    for place, size in needs:
        by_disk.setdefault(place.stat().st_dev, []).append((place, size))
    for places in by_disk.values():
        home, needed = places[0][0], sum(size for _, size in places)
        free = shutil.disk_usage(home).free
        if free < needed:
            raise UserError(
                f"output {output} needs {_text(needed)} in {home} and its disk has {_text(free)} free: "
                "free some space or choose another --output-dir or --work-dir"
            )


def _text(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e6:.2f} MB"


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory, if there is one."""
    return sum(file.lstat().st_size for file in directory.rglob("*") if file.is_file() and not file.is_symlink())


def require_ours(output: Path) -> None:
    """Raises UserError for a directory that holds something and was not written by slimlm."""
    if any(output.iterdir()) and not (output / MANIFEST_NAME).is_file():
        raise UserError(f"output directory {output} holds something slimlm did not write: choose another")
