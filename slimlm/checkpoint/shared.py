"""An output that several ranks build: one of them writes it, or one on each of several disks that do not see another.

Whoever writes holds the lock, and leaves the whole result on its disk in the end. Every rank has files of its own for
what waits.
"""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from slimlm.checkpoint.disk import disk_errors
from slimlm.checkpoint.staging import Staging
from slimlm.ranks import Ranks


@contextmanager
def shared(
    ranks: Ranks, output: Path, work_dir: Path | None, own: AbstractContextManager[Staging]
) -> Iterator[Staging]:
    """The place where an output is built, for all ranks. own: entered by those that write."""
    if ranks.size == 1:
        with own as staging:
            yield staging
        return
    ranks.writes = _writes(ranks, output)
    if ranks.writes:
        with own as staging:
            ranks.agreed(staging.work_dir)
            ranks.meet()  # before that, what an earlier run left may still be going
            yield staging
            ranks.meet()  # before it takes its name, and what others still read goes
    else:
        staging = Staging(output, ranks.agreed(work_dir))
        ranks.meet()
        yield staging
        shutil.rmtree(_own_scratch(ranks, staging), ignore_errors=True)  # on a disk where nobody writes, too
        ranks.meet()
    ranks.meet()  # now all may read it by its name


def scratch_of(ranks: Ranks, staging: Staging) -> Path:
    """Where a rank's hidden states wait."""
    if ranks.first:
        return staging.scratch
    own = _own_scratch(ranks, staging)
    with disk_errors(own):
        own.mkdir(parents=True, exist_ok=True)
    return own


def _own_scratch(ranks: Ranks, staging: Staging) -> Path:
    return staging.scratch / f"rank-{ranks.rank}"


def _writes(ranks: Ranks, output: Path) -> bool:
    """Whether this rank is the first of those that see the same disk there."""
    home = next(parent for parent in output.absolute().parents if parent.is_dir())
    mark = ranks.agreed(home) / ranks.agreed(f".slimlm-{uuid.uuid4().hex}")
    if ranks.first:
        with disk_errors(mark):
            mark.touch()
    ranks.meet()
    same = output == ranks.agreed(output)
    where = "with the first" if same and mark.exists() else f"{ranks.host} {output}"
    first_there = ranks.gather(where).index(where)
    if ranks.first:
        mark.unlink()
    return first_there == ranks.rank
