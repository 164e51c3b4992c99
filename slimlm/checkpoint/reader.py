"""Reading safetensors checkpoints lazily, and refusing broken ones before any work starts."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimlm.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SCAN_ELEMENTS = 1 << 24
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Checkpoint:
    """The tensors of a safetensors checkpoint directory, by their names in the files.

    Opening it reads the index and every shard's header. Raises UserError, naming file and tensor, for a missing or
    truncated shard, an index that disagrees with the shards or points outside the directory, and pickled weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file_of = self._read_index()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.files = sorted(set(self.file_of.values()))
        for file in self.files:
            self._read_header(file)

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self.path / INDEX_NAME
        if index.is_file():
            return _parse_index(index)
        single = self.path / SINGLE_NAME
        if single.is_file():
            with _opened(single) as file:
                return dict.fromkeys(file.keys(), SINGLE_NAME)
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pth")):
            raise UserError(
                f"{self.path} holds pickled weights only; slimlm reads safetensors, which cannot run code: "
                "convert with "
                "`AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)`"
            )
        raise UserError(f"{self.path} holds no weights: neither {SINGLE_NAME} nor {INDEX_NAME}")

    def _read_header(self, name: str) -> None:
        path = self.path / name
        if not path.is_file():
            raise UserError(f"shard {path} is missing, though {INDEX_NAME} lists it: fetch the model again")
        with _opened(path) as file:
            present = set(file.keys())
            for key in (key for key, home in self.file_of.items() if home == name):
                if key not in present:
                    raise UserError(
                        f"tensor {key} is not in {path}, though {INDEX_NAME} says so: fetch the model again"
                    )
                header = file.get_slice(key)
                self.shapes[key] = tuple(header.get_shape())
                self.dtypes[key] = _DTYPES.get(header.get_dtype(), torch.float32)

    @contextmanager
    def tensors(self, keys: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Lazy slices (`slice[...]` reads) of the named tensors, valid inside the context."""
        with ExitStack() as stack:
            handles: dict[str, Any] = {}
            for file in {self.file_of[key] for key in keys}:
                handles[file] = stack.enter_context(_opened(self.path / file))
            yield {key: handles[self.file_of[key]].get_slice(key) for key in keys}

    def read(self, key: str) -> Tensor:
        """One whole tensor, in the dtype it is stored in."""
        with self.tensors([key]) as slices:
            tensor: Tensor = slices[key][...]
            return tensor

    def check_finite(self, advance: Callable[[int], None] = lambda done: None) -> None:
        """Read every weight once. Raises UserError naming the first tensor that holds NaN or Inf."""
        for key in self.shapes:
            tensor = self.read(key)
            for chunk in tensor.reshape(-1).split(SCAN_ELEMENTS):
                if chunk.is_floating_point() and not torch.isfinite(chunk).all():
                    what = "NaN" if torch.isnan(chunk).any() else "Inf"
                    raise UserError(f"tensor {key} in {self.path / self.file_of[key]} holds {what}")
            advance(tensor.numel())

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype most of the weights are stored in."""
        sizes: Counter[torch.dtype] = Counter()
        for key, shape in self.shapes.items():
            sizes[self.dtypes[key]] += math.prod(shape)
        return sizes.most_common(1)[0][0]

    def bytes_on_disk(self) -> int:
        """Size of the weight files."""
        return sum((self.path / file).stat().st_size for file in self.files)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of config and weight files, by name."""
        return {name: file_hash(self.path / name) for name in ["config.json", *self.files]}


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}): fetch it again") from error


def _parse_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        pairs = {str(key): str(file) for key, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not a safetensors index: {type(error).__name__} {error}") from error
    for key, file in pairs.items():
        if Path(file).name != file or file in ("", ".", ".."):
            raise UserError(f"{index} sends tensor {key} to {file!r}, outside the model directory: refused")
    if not pairs:
        raise UserError(f"{index} lists no tensors")
    return pairs
