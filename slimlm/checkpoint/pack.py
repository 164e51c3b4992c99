"""A pruned checkpoint as an archive without its zeros: a bit per weight and the weights that are not zero.

The archive is a directory: safetensors with `<name>#mask` (uint8, a bit per weight) and `<name>#values` for every
tensor that gets smaller this way, all others as they are; `packed.json` with the shapes; and under `files/` whatever
else the checkpoint consists of, so that nothing takes the archive for a model. Unpacking gives the same tensors to
the last bit, and the other files as they were.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy
import torch
from torch import Tensor

from slimlm.checkpoint.disk import disk_errors
from slimlm.checkpoint.kinds import INDEX_NAME, PACKED_NAME, SINGLE_NAME
from slimlm.checkpoint.output import staged_output, unfinished
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.shard import StoredTensor, TensorSpec
from slimlm.checkpoint.staging import Staging
from slimlm.checkpoint.writer import CheckpointWriter
from slimlm.errors import UserError, out_of_memory

FILES = "files"
FORMAT = 1
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Advance = Callable[[int], None]
ADVICE = "every tensor has to fit in memory, one at a time: use a larger machine"


@out_of_memory(ADVICE)
def pack(source: Path, output: Path, advance: Advance = lambda tensors: None) -> tuple[int, int]:
    """Write the archive of a checkpoint directory; bytes of weights before and after. One tensor is in memory at once.

    Raises UserError for a directory that is no checkpoint or an output that is taken, RunFailure when the disk is full.
    """
    _refuse_taken(source, output)
    checkpoint = Checkpoint(source)
    _refuse_partial(checkpoint)
    counts = {name: _nonzero(stored) for name, stored in checkpoint.tensors.items()}
    specs: dict[str, TensorSpec] = {}
    shapes: dict[str, list[int]] = {}
    for name, stored in checkpoint.tensors.items():
        parts = {
            f"{name}#mask": TensorSpec((-(-math.prod(stored.shape) // 8),), torch.uint8),
            f"{name}#values": TensorSpec((counts[name],), stored.dtype),
        }
        if sum(spec.nbytes for spec in parts.values()) < stored.nbytes:
            specs |= parts
            shapes[name] = list(stored.shape)
        else:
            specs[name] = stored
    with staged_output(output) as staging:
        writer = CheckpointWriter(staging.model, specs)
        for name, stored in checkpoint.tensors.items():
            tensor = stored.read()
            if name in shapes:
                kept = _kept(tensor)
                writer.write(f"{name}#mask", torch.from_numpy(numpy.packbits(kept.numpy())))
                writer.write(f"{name}#values", tensor.flatten()[kept])
            else:
                writer.write(name, tensor)
            advance(1)
        writer.finish()
        packed = json.dumps({"format": FORMAT, "shapes": shapes}, indent=2) + "\n"
        with disk_errors(staging.model):
            (staging.model / FILES).mkdir()
            _copy(filter(_is_companion, source.iterdir()), staging.model / FILES)
            (staging.model / PACKED_NAME).write_text(packed, encoding="utf-8")
    return checkpoint.bytes_on_disk(), Checkpoint(output).bytes_on_disk()


@out_of_memory(ADVICE)
def unpack(source: Path, output: Path, advance: Advance = lambda tensors: None) -> tuple[int, int]:
    """Write the checkpoint that an archive was made of; bytes of weights before and after.

    Raises UserError for a directory that is no archive or a damaged one, or an output that is taken.
    """
    _refuse_taken(source, output)
    shapes = _shapes(source)
    archive = Checkpoint(source)
    _refuse_damaged(archive, shapes)
    specs: dict[str, TensorSpec] = {}
    for key, stored in archive.tensors.items():
        name, _, part = key.rpartition("#")
        if part == "values":
            specs[name] = TensorSpec(tuple(shapes[name]), stored.dtype)
        elif part != "mask":
            specs[key] = stored
    with staged_output(output) as staging:
        writer = CheckpointWriter(staging.model, specs)
        for name in specs:
            writer.write(name, _restored(archive, name, shapes) if name in shapes else archive.read(name))
            advance(1)
        writer.finish()
        with disk_errors(staging.model):
            _copy((source / FILES).iterdir(), staging.model)
    return archive.bytes_on_disk(), Checkpoint(output).bytes_on_disk()


def _refuse_partial(checkpoint: Checkpoint) -> None:
    """Raises UserError for a checkpoint that could not be given back as it is."""
    if any("/" in file for file in checkpoint.files) or checkpoint.chosen not in (
        SINGLE_NAME,
        INDEX_NAME,
    ):
        raise UserError(
            f"{checkpoint.path} has its weights in a place of its own: save it with `save_pretrained` first"
        )
    for why in checkpoint.unreadable.values():
        raise UserError(why)
    for key in sorted(checkpoint.absent):
        raise UserError(f"tensor {key} is in no file of {checkpoint.path}, though its index lists it: fetch it again")


def _refuse_damaged(archive: Checkpoint, shapes: dict[str, list[int]]) -> None:
    """Raises UserError for an archive that lacks a part of any tensor, or the checkpoint's other files."""
    if not (archive.path / FILES).is_dir():
        raise UserError(f"{archive.path} is damaged: it has no {FILES}/")
    for name in shapes:
        for part in ("mask", "values"):
            if f"{name}#{part}" not in archive.tensors:
                raise UserError(f"{archive.path} is damaged: it lacks the {part} of {name}")
        if archive.tensors[f"{name}#mask"].dtype != torch.uint8:
            raise UserError(f"{archive.path} is damaged: the mask of {name} is not one of bits")
    for key in archive.tensors:
        name, _, part = key.rpartition("#")
        if part in ("mask", "values") and name not in shapes:
            raise UserError(f"{archive.path / PACKED_NAME} is damaged: it has no shape for {name}")


def _restored(archive: Checkpoint, name: str, shapes: dict[str, list[int]]) -> Tensor:
    mask, values = archive.read(f"{name}#mask"), archive.read(f"{name}#values")
    size = math.prod(shapes[name])
    if mask.numel() != -(-size // 8):
        raise UserError(f"{archive.path}: the mask of {name} is not one of {size} weights")
    kept = torch.from_numpy(numpy.unpackbits(mask.numpy(), count=size)).bool()
    if int(kept.sum()) != values.numel():
        raise UserError(f"{archive.path}: {name} has {values.numel()} values for {int(kept.sum())} places")
    tensor = torch.zeros(size, dtype=values.dtype)
    tensor[kept] = values
    return tensor.view(shapes[name])


def _shapes(source: Path) -> dict[str, list[int]]:
    path = source / PACKED_NAME
    if not path.is_file():
        raise UserError(f"{source} is not an archive of `slimlm pack`: it has no {PACKED_NAME}")
    try:
        packed = json.loads(path.read_text(encoding="utf-8"))
        if packed["format"] != FORMAT:
            raise UserError(f"{path} is of format {packed['format']}, this slimlm reads {FORMAT}: use a newer one")
        shapes = {str(name): [int(width) for width in shape] for name, shape in packed["shapes"].items()}
        if any(width < 0 for shape in shapes.values() for width in shape):
            raise ValueError("a shape is negative")
        return shapes
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _refuse_taken(source: Path, output: Path) -> None:
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{output} is inside {source}: choose another")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty: choose another")
    staging = Staging(output)
    if any(unfinished(staging)):
        raise UserError(f"{staging.root} holds what `slimlm compress` did not finish: choose another, or remove it")


def _is_companion(path: Path) -> bool:
    """Files but weights, and directories such as additional chat templates, but not git's and the hub's own."""
    if path.is_dir():
        return not path.name.startswith(".")
    return path.is_file() and path.suffix != ".safetensors" and path.name != INDEX_NAME


def _copy(paths: Iterable[Path], target: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


def _kept(tensor: Tensor) -> Tensor:
    """Which of the flattened values are not zero to the last bit: a minus zero stays what it is."""
    return tensor.contiguous().view(_BITS[tensor.dtype.itemsize]).flatten() != 0


def _nonzero(stored: StoredTensor) -> int:
    return sum(int(_kept(chunk).sum()) for chunk in stored.chunks())
