"""What decoding a token takes in any widths, from times of products in a few (after ZipLM, arXiv 2302.04089).

A product's time is interpolated between widths that were measured, evenly spaced, and what is no product is the same in
every block whatever its widths: norms, attention over a short text, Python.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from slimlm.errors import UserError
from slimlm.linalg.budget import spaced
from slimlm.model.shape_times import Shape, block_constant, products_seconds
from slimlm.model.walk import every
from slimlm.plain import Json
from slimlm.slice.config import narrows
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import COARSE, Layout, Widths

POINTS = 3  # widths of each axis that are measured
TIMES = "times of decoding"  # the step of a run's journal


def products_to_time(shapes: Shapes) -> Counter[Shape]:
    """All products that predictions rest on, and how many of them the dense model has: none of most.

    Raises UserError for a mixture, of which nothing is predicted.
    """
    if any(every(shapes.model, lambda block: block.family.experts is not None)):
        raise UserError("latency: what a mixture of experts takes is not predicted: give a sparsity")
    found, depth = _products(shapes, shapes.dense), shapes.dense.blocks
    for hidden, groups, mlp in itertools.product(*points_of(shapes.layout)):
        found.update(dict.fromkeys(_products(shapes, Widths(hidden, mlp, groups, depth)), 0))
    return found


def points_of(layout: Layout) -> tuple[list[int], list[int], list[int]]:
    """The widths of hidden, groups and mlp that are measured, the dense ones last; these alone where they stay."""
    stay = layout.fixed | (set() if narrows(layout) else {"hidden"})
    hidden, groups, mlp = (
        [layout.dense.of(name)] if name in stay else _points(layout.dense.of(name))
        for name in ("hidden", "groups", "mlp")
    )
    return hidden, groups, mlp


def _points(full: int) -> list[int]:
    """Widths evenly spaced: multiples of COARSE, or of the largest smaller power of two that leaves enough of them."""
    multiple = math.gcd(full, COARSE)
    while multiple > 1 and full // multiple < POINTS:
        multiple //= 2
    return spaced(full, multiple, POINTS) or [full]


def _products(shapes: Shapes, widths: Widths) -> Counter[Shape]:
    """In a whole step of decoding."""
    found = Counter([shapes.head_product(widths)])
    for kind, blocks in shapes.counted(widths.blocks).items():
        for shape, count in shapes.products(kind, widths).items():
            found[shape] += blocks * count
    return found


class Decoding:
    """Seconds of a step of decoding, by widths. More of a width never takes less: where noise says so, both take the
    longer time."""

    def __init__(self, shapes: Shapes) -> None:
        times = shapes.model.times
        assert times is not None
        self.shapes = shapes
        self.times = times
        self._known: dict[tuple[int, ...], Tensor] = {}
        self.hidden, self.groups, self.mlp = points_of(shapes.layout)
        ran = replace(shapes.dense, blocks=tuple(range(times.blocks)))
        measured = products_seconds(_products(shapes, ran), times.products)
        self.constant = max(0.0, block_constant(times.step, measured, times.blocks))

    def described(self, widths: Widths) -> dict[str, Json]:
        """Of one split and of the dense model, for the manifest, and what that rests on."""
        return {
            "predicted_ms": 1000 * self.of(widths),
            "dense_ms": 1000 * self.dense,
            "ratio": self.of(widths) / self.dense,
            "times": self.times.described(),
        }

    @cached_property
    def dense(self) -> float:
        """Of the dense model."""
        return self.of(self.shapes.dense)

    def of(self, widths: Widths) -> float:
        """Of one split."""
        return float(self.each([widths]))

    def each(self, splits: Sequence[Widths]) -> Tensor:
        """Of several splits: [splits]."""
        hidden, groups, mlp = (
            _weights(points, [split.of(name) for split in splits])
            for name, points in (("hidden", self.hidden), ("groups", self.groups), ("mlp", self.mlp))
        )
        known = torch.stack([self._at_points(split.blocks) for split in splits])
        return torch.einsum("sh,sg,sm,shgm->s", hidden, groups, mlp, known)

    def across(self, depth: int, sides: Sequence[tuple[int, int]], mlps: Sequence[int]) -> Tensor:
        """Of each hidden_size and number of groups with each MLP, in so many first blocks: [sides, mlps]."""
        hidden = _weights(self.hidden, [side[0] for side in sides])
        groups = _weights(self.groups, [side[1] for side in sides])
        known = torch.einsum("sh,sg,hgm->sm", hidden, groups, self._at_points(tuple(range(depth))))
        return known @ _weights(self.mlp, mlps).T

    def _at_points(self, blocks: tuple[int, ...]) -> Tensor:
        """With these blocks at all points: [hidden, groups, mlp]."""
        if blocks not in self._known:
            splits = [
                Widths(hidden, mlp, groups, blocks)
                for hidden, groups, mlp in itertools.product(self.hidden, self.groups, self.mlp)
            ]
            sums = [products_seconds(_products(self.shapes, split), self.times.products) for split in splits]
            found = torch.tensor(sums, dtype=torch.float64).view(len(self.hidden), len(self.groups), len(self.mlp))
            for axis in range(found.dim()):
                found = found.cummax(axis).values
            self._known[blocks] = found + len(blocks) * self.constant
        return self._known[blocks]


def _weights(points: Sequence[int], values: Sequence[int]) -> Tensor:
    """What counts of what is known at each of the points for values between, and before the first as between the first
    two: [values, points]."""
    if len(points) == 1:
        return torch.ones(len(values), 1, dtype=torch.float64)
    at, wanted = torch.tensor(points, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    right = torch.searchsorted(at, wanted).clamp(1, len(points) - 1)
    share = ((wanted - at[right - 1]) / (at[right] - at[right - 1]))[:, None]
    after, before = (torch.eye(len(points), dtype=torch.float64)[place] for place in (right, right - 1))
    return share * after + (1 - share) * before
