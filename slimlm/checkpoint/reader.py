"""Reading safetensors checkpoints lazily, and refusing broken ones before any work starts."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import torch
from torch import Tensor

from slimlm.checkpoint.kinds import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    names_in,
    other_kind,
    refuse_stand_in,
)
from slimlm.checkpoint.shard import StoredTensor, read_shard
from slimlm.errors import UserError, one_line
from slimlm.linalg.finite import all_finite
from slimlm.plain import Json
from slimlm.ranks import ALONE, Ranks


class Checkpoint:
    """The tensors of a safetensors checkpoint directory, by their names in the files that `from_pretrained` reads.

    Opening it reads the index and every shard's header. Raises UserError, naming the file, for a missing or truncated
    shard, an index that points outside the directory, and weights of another kind. `unreadable` says of tensors in a
    dtype slimlm does not know what is wrong with them, for when one is needed; `absent` are those that only the index
    knows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chosen = chosen_weights(path)
        self.index = Index([self.chosen]) if self.chosen.endswith(".safetensors") else read_index(path, self.chosen)
        self.files = self.index.files
        self.tensors: dict[str, StoredTensor] = {}
        self.unreadable: dict[str, str] = {}
        self._unused_bytes = 0
        self._hashes: dict[str, str] = {}
        self._first_dtype = self._open()

    def _open(self) -> torch.dtype:
        """Of a name that several files hold, the last file's counts, whatever the index says: so it is in
        transformers. The dtype is that of the first floating-point tensor."""
        first: list[torch.dtype] = []
        for name in self.files:
            file = self.path / name
            if not file.is_file():
                raise UserError(f"shard {file} is missing, though its index lists it: fetch the model again")
            tensors, unreadable = read_shard(file)
            first.extend(stored.dtype for stored in tensors.values() if name == self.files[0])
            self.tensors |= tensors
            self.unreadable = {key: why for key, why in self.unreadable.items() if key not in tensors} | unreadable
        for key in self.unreadable:
            self.tensors.pop(key, None)
        if not self.tensors and not self.unreadable:
            raise UserError(f"{self.path / self.files[0]} holds no tensors")
        self.absent = self.index.keys - self.tensors.keys() - self.unreadable.keys()
        return next((dtype for dtype in first if dtype.is_floating_point), torch.float32)

    def use_only(self, keys: Collection[str]) -> None:
        """From here on these tensors are all there is: nothing else decides a dtype, a size, or a refusal."""
        self._unused_bytes += sum(stored.nbytes for key, stored in self.tensors.items() if key not in keys)
        self.tensors = {key: stored for key, stored in self.tensors.items() if key in keys}

    def read(self, key: str) -> Tensor:
        """One whole tensor, of any shape, in the dtype it is stored in. Raises UserError where its file is cut off."""
        return self.tensors[key].read()

    def prefetch(self, keys: Iterable[str]) -> None:
        """Have the named tensors' bytes on their way from the disk while something else is computed."""
        for key in keys:
            self.tensors[key].prefetch()

    def check_finite(self, advance: Callable[[int], None] = lambda done: None, ranks: Ranks = ALONE) -> None:
        """Read every weight once, on one rank or another. Raises UserError naming the first tensor that holds NaN or
        Inf."""
        for key, stored in list(self.tensors.items())[ranks.rank :: ranks.size]:
            for chunk in stored.chunks():
                if chunk.is_floating_point() and not all_finite(chunk):
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
    def auto_dtype(self) -> torch.dtype:
        """What `from_pretrained(dtype="auto")` takes where the config has none: what the index says, else the dtype of
        the first floating-point tensor of the first file, used or not."""
        return self.index.dtype or self._first_dtype

    @property
    def elements(self) -> int:
        """How many numbers all tensors hold."""
        return sum(math.prod(stored.shape) for stored in self.tensors.values())

    def bytes_on_disk(self) -> int:
        """Size of the weight files, but for tensors that are not used."""
        return sum((self.path / file).stat().st_size for file in self.files) - self._unused_bytes

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of config and weight files, by name."""
        return {name: (self.path / name).stat().st_size for name in ["config.json", *self.files]}

    def hashes(self, ranks: Ranks = ALONE) -> dict[str, str]:
        """SHA-256 of config and weight files, by name, as they were when first asked for, by all ranks."""
        if not self._hashes:
            names = ["config.json", *self.files]
            own = {name: file_hash(self.path / name) for name in names[ranks.rank :: ranks.size]}
            found = ranks.merged(own)
            self._hashes = {name: found[name] for name in names}
        return self._hashes


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def chosen_weights(path: Path) -> str:
    """The file in a directory that `from_pretrained` would open: one with all weights, or an index of several.

    Raises UserError saying what the directory is instead, when there is none.
    """
    explicit = stated_weights(path)
    for name in (explicit,) if explicit else (SINGLE_NAME, INDEX_NAME):
        if (path / name).is_file():
            return name
        if (path / name).is_symlink():
            raise UserError(f"{path / name} is a link to {(path / name).readlink()}, which does not exist")
    if explicit:
        raise UserError(f"{path / CONFIG_NAME} says that the weights are in {explicit}, which is not there")
    raise other_kind(path, names_in(path))


def stated_weights(path: Path) -> str | None:
    """The file that config.json names, where it names one. Raises UserError for one outside or of another kind."""
    if not (path / CONFIG_NAME).is_file():
        return None
    name = read_config(path).get("transformers_weights")
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{path / CONFIG_NAME}: transformers_weights is {name!r:.80}, not a safetensors file")
    if not _is_inside(name):
        raise UserError(f"{path / CONFIG_NAME}: transformers_weights is {name!r:.80}, outside the model directory")
    return name


def read_config(path: Path) -> dict[str, Json]:
    """config.json as it is written. Raises UserError for what is no JSON mapping."""
    file = path / CONFIG_NAME
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse_stand_in(file)
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} cannot be read: it is not a mapping of names to values")
    return values


@dataclass(frozen=True)
class Index:
    """Files of weights, in the order transformers reads them; what of tensors' names and dtype is said beside them."""

    files: list[str]
    keys: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None


def read_index(path: Path, name: str) -> Index:
    """An index by its name. Raises UserError for what is none, or points outside its directory."""
    index = path / name
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        pairs = {str(key): str(file) for key, file in content["weight_map"].items()}
        stated = (content.get("metadata") or {}).get("dtype")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        refuse_stand_in(index)
        raise UserError(f"{index} is not a safetensors index: {type(error).__name__} {one_line(error)}") from error
    for key, file in pairs.items():
        if not _is_inside(file):
            raise UserError(f"{index} sends tensor {key} to {file!r:.80}, outside the model directory: refused")
    if not pairs:
        raise UserError(f"{index} lists no tensors")
    dtype = getattr(torch, str(stated).removeprefix("torch."), None)
    return Index(sorted(set(pairs.values())), frozenset(pairs), dtype if isinstance(dtype, torch.dtype) else None)


def _is_inside(file: str) -> bool:
    """Whether a name leads to a file in the directory or below it; links are followed, as in the hub's cache."""
    parts = file.split("/")
    named = not any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
    return named and not Path(file).is_absolute() and not PureWindowsPath(file).drive and not set(file) & {"\0", "\\"}
