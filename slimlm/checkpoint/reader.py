"""Reading safetensors checkpoints lazily, and refusing broken ones before any work starts."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from slimlm.checkpoint.shard import StoredTensor, read_shard
from slimlm.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Checkpoint:
    """The tensors of a safetensors checkpoint directory, by their names in the files.

    Opening it reads the index and every shard's header. Raises UserError, naming file and tensor, for a missing or
    truncated shard, an index that disagrees with the shards or points outside the directory, and pickled weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = self._open()
        self.files = sorted({tensor.path.name for tensor in self.tensors.values()})

    def _open(self) -> dict[str, StoredTensor]:
        index = self.path / INDEX_NAME
        single = self.path / SINGLE_NAME
        if index.is_file():
            return self._open_shards(parse_index(index))
        if single.is_file():
            tensors = read_shard(single)
            if not tensors:
                raise UserError(f"{single} holds no tensors")
            return tensors
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pth")):
            raise UserError(
                f"{self.path} holds pickled weights only; slimlm reads safetensors, which cannot run code: "
                "convert with `AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)`"
            )
        raise UserError(
            f"{self.path} holds no safetensors weights, neither {SINGLE_NAME} nor {INDEX_NAME} "
            "(pickled ones are not read)"
        )

    def _open_shards(self, file_of: dict[str, str]) -> dict[str, StoredTensor]:
        shards = {}
        for name in sorted(set(file_of.values())):
            path = self.path / name
            if not path.is_file():
                raise UserError(f"shard {path} is missing, though {INDEX_NAME} lists it: fetch the model again")
            shards[name] = read_shard(path)
        for key, name in file_of.items():
            if key not in shards[name]:
                raise UserError(
                    f"tensor {key} is not in {self.path / name}, though {INDEX_NAME} says so: fetch the model again"
                )
        return {key: shards[name][key] for key, name in file_of.items()}

    def read(self, key: str) -> Tensor:
        """One whole tensor, in the dtype it is stored in."""
        return self.tensors[key].read()

    def prefetch(self, keys: Iterable[str]) -> None:
        """Have the named tensors' bytes on their way from the disk while something else is computed."""
        for key in keys:
            self.tensors[key].prefetch()

    def check_finite(self, advance: Callable[[int], None] = lambda done: None) -> None:
        """Read every weight once. Raises UserError naming the first tensor that holds NaN or Inf."""
        for key, stored in self.tensors.items():
            for chunk in stored.chunks():
                if chunk.is_floating_point() and not torch.isfinite(chunk).all():
                    what = "NaN" if torch.isnan(chunk).any() else "Inf"
                    raise UserError(f"tensor {key} in {stored.path} holds {what}")
                advance(chunk.numel())

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype most of the weights are stored in."""
        sizes: Counter[torch.dtype] = Counter()
        for stored in self.tensors.values():
            sizes[stored.dtype] += math.prod(stored.shape)
        return sizes.most_common(1)[0][0]

    @property
    def elements(self) -> int:
        return sum(math.prod(stored.shape) for stored in self.tensors.values())

    def bytes_on_disk(self) -> int:
        """Size of the weight files."""
        return sum((self.path / file).stat().st_size for file in self.files)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of config and weight files, by name, as they were when first asked for."""
        return {name: file_hash(self.path / name) for name in ["config.json", *self.files]}


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name. Raises UserError for what is no index, or points outside its directory."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(key): str(file) for key, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not a safetensors index: {type(error).__name__} {error}") from error
    for key, file in pairs.items():
        if Path(file).name != file or file in ("", ".", "..") or "\0" in file or len(file.encode()) > 255:
            raise UserError(f"{index} sends tensor {key} to {file!r:.80}, outside the model directory: refused")
    if not pairs:
        raise UserError(f"{index} lists no tensors")
    return pairs
