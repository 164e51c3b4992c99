"""How much goes of each matrix: plain numbers, known before the walk that prunes."""

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from slimlm.linalg.masks import Tile, pooled, smallest, smallest_per_group, spread_out
from slimlm.model.block import Group

ALONE: Tile = (1, 1)


@dataclass(frozen=True)
class Quota:
    """Of matrices that are stacked to one tall one, each with so many `rows`: of each its count of weights; or all but
    `keep` of every `group` neighbours in a row.

    tile: rows and columns of what goes or stays as one; counts are then of whole tiles' weights. seed: for draws.
    """

    rows: tuple[int, ...]
    counts: tuple[int, ...]
    keep: int = 0
    group: int = 0
    tile: Tile = ALONE
    seed: int = 0

    def smallest(self, scores: Tensor) -> Tensor:
        """Mask, bool, of what has the smallest scores of each matrix, or of every group in a row: [out, in] both."""
        if self.group:
            return smallest_per_group(scores, self.keep, self.group)
        parts = zip(scores.split(self.rows), self.counts, strict=True)
        return torch.cat([self.smallest_tiles(part, count) for part, count in parts])

    def smallest_tiles(self, scores: Tensor, count: int) -> Tensor:
        """Mask [out, in] bool of `count` weights of the smallest scores [out, in], or as many as are whole tiles."""
        return spread_out(smallest(pooled(scores, self.tile), count // math.prod(self.tile)), self.tile)

    def apart(self) -> Iterator[tuple[slice, "Quota"]]:
        """Each matrix alone, and where it is in the tall one."""
        ends = [0, *accumulate(self.rows)]
        for number, (start, stop) in enumerate(pairwise(ends)):
            own = replace(self, rows=(stop - start,), counts=(self.counts[number],), seed=self.seed + number)
            yield slice(start, stop), own


@dataclass(frozen=True)
class Quotas:
    """The quota of every group of linears. counts: of each matrix, by full name. The rest as in `Quota`."""

    counts: Mapping[str, int]
    keep: int = 0
    group: int = 0
    tile: Tile = ALONE
    seed: int = 0

    def __getitem__(self, group: Group) -> Quota:
        counts = tuple(self.counts[name] for name in group.full_names)
        seed = zlib.crc32(f"{self.seed} {group.full_names[0]}".encode())
        return Quota(tuple(group.rows), counts, self.keep, self.group, self.tile, seed)


def whole_tiles(counts: Mapping[str, int], tile: Tile) -> dict[str, int]:
    """Counts of weights in whole tiles, as many in all as there are nearest to as many weights."""
    area, wanted, taken = math.prod(tile), 0, 0
    found: dict[str, int] = {}
    for name, count in counts.items():
        wanted += count
        found[name] = round(wanted / area) * area - taken
        taken += found[name]
    return found
