"""Which split of a sparsity to take: where the loss on held-out windows rises least.

Every width is cut alone to a few sizes, all in one pass over the model, and the rise of the loss measured; what a
combination costs is taken to be the sum. Cutting is done as the run will do it, but for the refit: projecting the
stream onto the basis, deleting neurons and key/value groups by structured OBS, leaving out the blocks that change the
stream least (ShortGPT, arXiv 2403.03853, eq. 1).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimlm.linalg.budget import LossCurve, predicted_loss, spaced
from slimlm.linalg.gram import Gram
from slimlm.linalg.regression import HELD_EVERY
from slimlm.linalg.units import removals
from slimlm.model.block import Block
from slimlm.model.ends import nll
from slimlm.model.rotation import tied_gain
from slimlm.model.stream import Stream
from slimlm.slice.basis import Basis
from slimlm.slice.widths import Layout, Widths
from slimlm.statistics.grams import input_sums

DEARER = 1.05  # a split that every format and kernel takes is preferred to one that costs so much less
POINTS = {"hidden": 4, "mlp": 3, "groups": 2, "blocks": 2, "tied": 1}
CUTS = sum(POINTS.values()) + 2  # streams: one for each, the dense one, and the one to find what to delete from
WINDOWS = 24  # held out, to measure a curve on, and as many to find what to delete from
REFIT_LEAVES = {"hidden": 0.75, "tied": 0.25}  # of what cutting costs, the share that the refit does not win back
Curves = Mapping[str, LossCurve]  # by axis


def measured_on(windows: int) -> int:
    """Held-out ones among so many calibration windows; all of them where those are too few."""
    return min(WINDOWS, windows // HELD_EVERY or windows)


@dataclass(frozen=True)
class Cut:
    """One width cut alone: how many units of which axis are gone."""

    axis: str
    removed: int


def choose(layout: Layout, splits: Sequence[Widths], found: Basis, curves: Curves) -> tuple[Widths, dict[str, object]]:
    """The split with the least predicted loss, and the figures it was chosen by.

    One that all formats and kernels take is chosen where it costs hardly more.
    """
    scored = sorted((predicted_loss(curves, removed(layout, split)), index) for index, split in enumerate(splits))
    near = [entry for entry in scored if entry[0] <= DEARER * scored[0][0] and layout.suits_all(splits[entry[1]])]
    scored.remove(chosen := (near or scored)[0])
    notes = {
        "curves": {axis: [list(point) for point in curve.points] for axis, curve in curves.items()},
        "curve_errors": {axis: list(curve.errors) for axis, curve in curves.items()},
        "predicted_loss": chosen[0],
        "splits": len(splits),
        "next": [f"{splits[index]}: {loss:.4f}" for loss, index in scored[:3]],
    }
    return with_best_blocks(splits[chosen[1]], found), notes


def with_best_blocks(split: Widths, found: Basis) -> Widths:
    """The split with so many blocks of those that change the stream most."""
    return replace(split, blocks=_kept(found.influence, len(split.blocks)))


def after_refit(curves: Curves) -> dict[str, LossCurve]:
    """The curves with what the refit will win back."""
    return {axis: curve.scaled(REFIT_LEAVES.get(axis, 1.0)) for axis, curve in curves.items()}


def removed(layout: Layout, widths: Widths) -> dict[str, int]:
    """Units of each axis that a split removes."""
    dense = layout.dense
    return {
        "hidden": dense.hidden - widths.hidden,
        "mlp": dense.mlp - widths.mlp,
        "groups": dense.groups - widths.groups,
        "blocks": len(dense.blocks) - len(widths.blocks),
        "tied": int(widths.tied),
    }


def cuts_of(layout: Layout, splits: Sequence[Widths]) -> list[Cut]:
    """The widths to measure alone, for all that the splits ask for."""
    return [
        Cut(axis, units)
        for axis, count in POINTS.items()
        for units in _points([removed(layout, split)[axis] for split in splits], count)
    ]


def _points(sizes: list[int], count: int) -> list[int]:
    """Sizes to measure a curve at, for the sizes that splits ask for."""
    largest = max(sizes)
    return spaced(largest, math.gcd(*sizes), count) if largest else []


def _kept(influence: Tensor, depth: int) -> tuple[int, ...]:
    """The `depth` blocks that change the stream most, in order."""
    return tuple(sorted(influence.argsort(descending=True, stable=True)[:depth].tolist()))


@dataclass
class CutStreams:
    """The streams that curves are measured on. learning: of the dense model, to find what to delete from. cut: each of
    the dense model with one width cut, and of the dense model itself (None). length: tokens of a window."""

    layout: Layout
    found: Basis
    learning: Stream
    cut: dict[Cut | None, Stream]
    length: int

    def curves(self, walk: Iterable[Block]) -> dict[str, LossCurve]:
        """For each axis that is cut, the measured rise of the held-out loss at a few sizes. walk: over all."""
        for cut, stream in self.cut.items():
            if cut is not None:
                self._at_start(cut, stream)
        for block in walk:
            self._through(block)
        model = self.layout.model
        with model.quick_products():
            sums = nll(model, self.cut.values())
        losses = {cut: of_window / (self.length - 1) for cut, of_window in zip(self.cut, sums, strict=True)}
        points = {axis: [(cut.removed, losses[cut]) for cut in self.cut if cut and cut.axis == axis] for axis in POINTS}
        return {axis: LossCurve.measured(measured, losses[None]) for axis, measured in points.items()}

    def _at_start(self, cut: Cut, stream: Stream) -> None:
        """What a cut does to what the embedding gives."""
        model = self.layout.model
        if cut.axis == "tied":
            gain = tied_gain(model).to(model.device, model.dtype)
            changed = (hidden * gain for hidden in stream.hidden)
        elif cut.axis == "hidden":
            kept = self._directions(cut)
            changed = (hidden @ kept @ kept.T for hidden in stream.hidden)
        else:
            return
        for number, hidden in enumerate(changed):
            stream.hidden.replace(number, hidden)
        stream.hidden.turn()

    def _through(self, block: Block) -> None:
        """Every stream past a block, its weights loaded, cut as the stream says."""
        orders = {
            name: _Deleting(self.layout, name, block)
            for name, axis in self.layout.axes.items()
            if any(cut and cut.axis == name for cut in self.cut) and block.family.has(axis)
        }
        names = [name for order in orders.values() for name in order.matrices]
        ranks, model = self.learning.deal.ranks, self.layout.model
        grams = input_sums(block, self.learning, names, Gram, onward=True, owners=[0] * len(names))
        for axis, order in orders.items():
            counts = sorted(cut.removed for cut in self.cut if cut and cut.axis == axis)
            found = order.weights(grams, counts) if ranks.first else iter(())
            for count in counts:
                weight = ranks.once(next(found)[1] if ranks.first else None)
                with block.placed({order.parameter: weight}), model.quick_products():
                    block.advance(self.cut[Cut(axis, count)])
        for cut, stream in self.cut.items():
            if cut and (cut.axis in orders or (cut.axis == "blocks" and block.index not in self._left(cut))):
                continue
            changed = self._projected(block, cut) if cut and cut.axis == "hidden" else {}
            with block.placed(changed), model.quick_products():
                block.advance(stream)

    def _directions(self, cut: Cut) -> Tensor:
        """Those that a cut of the stream leaves: [hidden, width]."""
        model = self.layout.model
        return self.found.of(self.layout.dense.hidden - cut.removed).to(model.device, model.dtype)

    def _projected(self, block: Block, cut: Cut) -> dict[str, Tensor]:
        """What writes to the stream in a block, by name within it, in the directions that a cut leaves."""
        kept, weights = self._directions(cut), block.weights()
        return {name: kept @ (kept.T @ weights[name]) for name in block.family.writing if name in weights}

    def _left(self, cut: Cut) -> tuple[int, ...]:
        """Blocks that a cut of these leaves."""
        return _kept(self.found.influence, len(self.found.influence) - cut.removed)


class _Deleting:
    """What to delete of one axis of a block, from the inputs of the linear, or of the experts, that it narrows."""

    def __init__(self, layout: Layout, name: str, block: Block) -> None:
        narrowed, family = layout.axes[name].columns[0], block.family
        self.is_packed = narrowed not in family.writers
        self.parameter = narrowed if self.is_packed else f"{narrowed}.weight"
        names = family.experts.writing if family.experts and self.is_packed else (narrowed,)
        self.matrices = {name: block.matrix(name) for name in names}
        self.size = self.matrices[names[0]].shape[1] // layout.dense.of(name)

    def weights(self, grams: dict[str, Gram], counts: list[int]) -> Iterator[tuple[int, Tensor]]:
        """The parameter without the first so many units to go, its own of every expert: (number, parameter) for each,
        ascending. To be used before the next is asked for.

        grams: of the matrices' inputs, each used up; an expert that no token reached has none.
        """
        if not self.is_packed:
            ((name, weight),) = self.matrices.items()
            for gone, left in removals(grams.pop(name).take(), weight, self.size, counts):
                yield len(gone), left
            return
        like = next(iter(self.matrices.values()))
        packed = {count: like.new_empty(len(self.matrices), *like.shape) for count in counts}
        for expert, (name, weight) in enumerate(self.matrices.items()):
            known = grams.pop(name, None)
            inputs = weight.shape[1]
            gram = known.take() if known else torch.eye(inputs, dtype=torch.float32, device=weight.device)
            for gone, left in removals(gram, weight, self.size, counts):
                packed[len(gone)][expert] = left
        yield from packed.items()
