"""Writing a safetensors checkpoint tensor by tensor, in bounded memory.

All shapes are known before the first tensor is, so every shard's header and length are laid down first and each
tensor goes straight to its place. The result is what `save_pretrained` would write: one `model.safetensors`, or
numbered shards with an index.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slimlm.checkpoint.reader import DTYPE_NAMES, INDEX_NAME, SINGLE_NAME
from slimlm.errors import RunFailure

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int


class CheckpointWriter:
    """Writes the tensors of `specs`, each once and in any order, into `directory`.

    Disk space is taken on construction; RunFailure names the file when there is too little, then or later.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.directory = directory
        self.specs = dict(specs)
        self.places: dict[str, _Place] = {}
        self.missing = set(specs)
        shards = _group(self.specs, max_shard_bytes)
        for number, names in enumerate(shards, start=1):
            file = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(directory / file, names)

    def _lay_out(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            spec = self.specs[name]
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with _disk_errors(path), path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            if offset:
                os.posix_fallocate(file.fileno(), start, offset)
        for name in names:
            self.places[name] = _Place(path, start + header[name]["data_offsets"][0])  # type: ignore[index]

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place, cast to the planned dtype. Raises ValueError for another shape than planned."""
        spec, place = self.specs[name], self.places[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, planned {list(spec.shape)}")
        data = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        with _disk_errors(place.file), place.file.open("r+b") as file:
            file.seek(place.offset)
            file.write(data.data)
        self.missing.discard(name)

    def finish(self) -> None:
        """Write the index, if there are several shards, and flush to disk. Raises ValueError for a missing tensor."""
        if self.missing:
            raise ValueError(f"tensors never written: {', '.join(sorted(self.missing)[:5])}")
        files = sorted({place.file for place in self.places.values()})
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self.specs.values())},
                "weight_map": {name: place.file.name for name, place in sorted(self.places.items())},
            }
            path = self.directory / INDEX_NAME
            with _disk_errors(path):
                path.write_text(json.dumps(index, indent=2) + "\n")
        for path in files:
            with _disk_errors(path), path.open("rb") as file:
                os.fsync(file.fileno())


def _group(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    """Consecutive tensors together, up to `limit` bytes a shard (a single larger tensor has its own)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns the system's word for a full or failing disk into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise RunFailure(f"cannot write {path}: {error.strerror or error}") from error
