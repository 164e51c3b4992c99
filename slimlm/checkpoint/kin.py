"""What a checkpoint's stream is of the dense model's that it was made of, for whoever compares the two again.

It lies in a folder of its own, since some programs load every safetensors file beside the config.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from slimlm.checkpoint.disk import disk_errors, write_whole
from slimlm.checkpoint.manifest import read_manifest, steps_in

KIN = Path("slimlm") / "basis.safetensors"
MOVING = ("slice", "rotate")  # methods


class Kin(NamedTuple):
    """basis: S, so that the stream is x S behind every block, x being the dense one. blocks: the numbers there of the
    blocks that are still there."""

    basis: Annotated[Tensor, "hidden width"]
    blocks: Annotated[Tensor, "blocks", torch.int64]

    def of(self, later: "Kin") -> "Kin":
        """What a model is of the dense one that a third was made of, which is `self` of it, and the model `later` of
        that third."""
        return Kin(self.basis @ later.basis.to(self.basis), self.blocks[later.blocks])


def kin_files(directory: Path) -> list[Path]:
    """The file of a checkpoint that says it, if there is one."""
    return [path for path in [directory / KIN] if path.is_file()]


def kept_kin(directory: Path, hidden: int, blocks: int) -> Kin | None:
    """What the file of a checkpoint of a width and so many blocks says; None without one, or of other shapes."""
    for path in kin_files(directory):
        kin = Kin(**load_file(path))
        return kin if (kin.basis.shape[1], len(kin.blocks)) == (hidden, blocks) else None
    return None


def is_moved(directory: Path) -> bool:
    """Whether a checkpoint's stream is another one than the dense model's, or may be."""
    return bool(kin_files(directory)) or any(step["method"] in MOVING for step in steps_in(read_manifest(directory)))


def read_kin(directory: Path, hidden: int, blocks: int) -> Kin | None:
    """What the file says, or the same as before where nothing was moved or left out; None where nobody knows."""
    kept = kept_kin(directory, hidden, blocks)
    if kept is not None or is_moved(directory):
        return kept
    return Kin(torch.eye(hidden, dtype=torch.float32), torch.arange(blocks))


def write_kin(kin: Kin, directory: Path) -> None:
    """Leave it with a checkpoint. Raises RunFailure on a full disk."""
    path = directory / KIN
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        write_whole(path, save({"basis": kin.basis.float().cpu().contiguous(), "blocks": kin.blocks.cpu()}))
