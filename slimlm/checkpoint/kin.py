"""What a checkpoint's stream is of the dense model's that it was made of, for whoever compares the two again.

It lies in a folder of its own, since some programs load every safetensors file beside the config.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimlm.checkpoint.disk import disk_errors
from slimlm.checkpoint.manifest import read_manifest, steps_in

KIN = Path("slimlm") / "basis.safetensors"
MOVING = ("slice", "rotate")  # methods


class Kin(NamedTuple):
    """basis: S, so that the stream is x S behind every block, x being the dense one. blocks: the numbers there of the
    blocks that are still there."""

    basis: Annotated[Tensor, "hidden width"]
    blocks: Annotated[Tensor, "blocks", torch.int64]

    @property
    def is_same(self) -> bool:
        """Whether it is the dense one's."""
        hidden, width = self.basis.shape
        moved = hidden != width or not torch.equal(self.basis, torch.eye(hidden, dtype=self.basis.dtype))
        return not moved and torch.equal(self.blocks, torch.arange(len(self.blocks)))

    def of(self, later: "Kin") -> "Kin":
        """What a model is of the dense one that a third was made of, which is `self` of it, and the model `later` of
        that third."""
        return Kin(self.basis @ later.basis.to(self.basis), self.blocks[later.blocks])


def kin_files(directory: Path) -> list[Path]:
    """The file of a checkpoint that says it, if there is one."""
    return [path for path in [directory / KIN] if path.is_file()]


def read_kin(directory: Path, hidden: int, blocks: int) -> Kin | None:
    """That of a checkpoint, of a width and so many blocks: what it says, or the same as before where nothing was moved
    or left out. None where it was and nothing says where to, or says it of other shapes."""
    for path in kin_files(directory):
        kin = Kin(**load_file(path))
        return kin if (kin.basis.shape[1], len(kin.blocks)) == (hidden, blocks) else None
    if any(step["method"] in MOVING for step in steps_in(read_manifest(directory))):
        return None
    return Kin(torch.eye(hidden, dtype=torch.float32), torch.arange(blocks))


def write_kin(kin: Kin, directory: Path) -> None:
    """Leave it with a checkpoint. Raises RunFailure on a full disk."""
    path = directory / KIN
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        save_file({"basis": kin.basis.float().cpu().contiguous(), "blocks": kin.blocks.cpu()}, path)
