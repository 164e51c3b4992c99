"""Writing a safetensors checkpoint tensor by tensor, in bounded memory.

All shapes are known before the first tensor is, so every shard's header and length are laid down first and each
tensor goes straight to its place. The result is what `save_pretrained` would write: one `model.safetensors`, or
numbered shards with an index.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from slimlm.checkpoint.disk import disk_errors, sync, write_whole
from slimlm.checkpoint.kinds import INDEX_NAME, SINGLE_NAME
from slimlm.checkpoint.shard import DTYPE_NAMES, StoredTensor, TensorSpec, bytes_of
from slimlm.errors import RunFailure
from slimlm.linalg.finite import all_finite

MAX_SHARD_BYTES = 5 * 10**9
ALIGNED = 64  # bytes: on a CPU weights stay in the mapped file, and products of those across cache lines are slower


class CheckpointWriter:
    """Writes the tensors of `specs`, each once and in any order, into `directory`.

    Disk space is taken on construction; RunFailure names the file when there is too little, then or later. Files that
    an earlier process laid out for the same specs are taken over as they are; `holds` tells what is in them.
    """

    def __init__(
        self, directory: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self.directory = directory
        self.specs = dict(specs)
        self.places: dict[str, StoredTensor] = {}
        self.missing = set(specs)
        shards = _group(self.specs, max_shard_bytes)
        for number, names in enumerate(shards, start=1):
            file = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(directory / file, names)
        self._write_index()

    def _write_index(self) -> None:
        files = sorted({place.path for place in self.places.values()})
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self.specs.values())},
                "weight_map": {name: place.path.name for name, place in sorted(self.places.items())},
            }
            write_whole(self.directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")

    def _lay_out(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets = {}
        end = 0
        for name in sorted(names, key=self._place_in_file):
            spec = self.specs[name]
            offsets[name], end = end, end + spec.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNED)
        front = len(text).to_bytes(8, "little") + text
        if not _starts_with(path, front, len(front) + end):
            with disk_errors(path), path.open("wb") as file:
                file.write(front)
                file.flush()
                if end and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), len(front), end)
                file.truncate(len(front) + end)
        for name in names:
            spec = self.specs[name]
            self.places[name] = StoredTensor(spec.shape, spec.dtype, path, len(front) + offsets[name])

    def _place_in_file(self, name: str) -> tuple[bool, int]:
        """Those of odd sizes last, the smallest dtypes behind, where they put no others out of step."""
        spec = self.specs[name]
        is_odd = spec.nbytes % ALIGNED > 0
        return is_odd, -spec.dtype.itemsize if is_odd else 0

    def write(self, name: str, tensor: Tensor | Iterator[Tensor]) -> str:
        """Put one tensor, whole or in runs of rows, [rows, ...], in its place, cast to the planned dtype; its SHA-256.

        Raises ValueError for another shape than planned, RunFailure for NaN or Inf in that dtype and on a full disk.
        """
        place = self.places[name]
        planned = (place.shape or (1,))[0]
        digest = hashlib.sha256()
        rows = 0
        with disk_errors(place.path), place.path.open("r+b") as file:
            file.seek(place.offset)
            for chunk in [tensor] if isinstance(tensor, Tensor) else tensor:
                rows += chunk.shape[0] if chunk.ndim else 1
                if chunk.shape[1:] != place.shape[1:] or rows > planned:
                    raise ValueError(f"tensor {name} has shape {list(chunk.shape)}, planned {list(place.shape)}")
                data = bytes_of(self._cast(name, chunk))
                file.write(data)
                digest.update(data)
        if rows != planned:
            raise ValueError(f"tensor {name} has {rows} rows, planned {list(place.shape)}")
        self.missing.discard(name)
        return digest.hexdigest()

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        dtype = self.places[name].dtype
        cast = tensor.detach().to(device="cpu", dtype=dtype)
        if cast.is_floating_point() and not all_finite(cast):
            raise RunFailure(f"tensor {name} is not finite in {dtype}: write another --dtype")
        return cast

    def holds(self, hashes: Mapping[str, str]) -> bool:
        """Whether tensors an earlier process wrote are in place, by their SHA-256; if so they count as written."""
        if not all(_hash_of(self.places[name]) == hashes[name] for name in hashes):
            return False
        self.missing -= hashes.keys()
        return True

    def sync(self, names: Iterable[str]) -> None:
        """Wait until the named tensors are on the disk. Raises RunFailure when they cannot be."""
        for path in {self.places[name].path for name in names}:
            with disk_errors(path):
                sync(path)

    def finish(self) -> None:
        """Flush everything to disk. Raises ValueError for a tensor that was never written."""
        if self.missing:
            raise ValueError(f"tensors never written: {', '.join(sorted(self.missing)[:5])}")
        self.sync(self.places)


def _hash_of(place: StoredTensor) -> str:
    digest = hashlib.sha256()
    for chunk in place.chunks():
        digest.update(bytes_of(chunk))
    return digest.hexdigest()


def _starts_with(path: Path, front: bytes, size: int) -> bool:
    """Whether a file of that size with that header is there already."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(front)) == front


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
