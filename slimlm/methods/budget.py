"""Which widths to cut for a requested sparsity: where the loss on held-out windows rises least.

Every width is cut alone to a few sizes, all in one pass over the model, and the rise of the loss measured; what a
combination costs is taken to be the sum. Cutting is done as the run will do it, but for the refit: projecting the
stream onto the basis, deleting neurons and key/value groups by structured OBS, leaving out the blocks that change the
stream least (ShortGPT, arXiv 2403.03853, eq. 1).
"""

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimlm.checkpoint.skeleton import parameter_count
from slimlm.linalg.budget import LossCurve, is_near, predicted_loss, rise_of, spaced
from slimlm.linalg.ridge import held_out
from slimlm.linalg.units import removals
from slimlm.matrices import matrix
from slimlm.methods.basis import Basis
from slimlm.methods.inputs import input_statistics
from slimlm.methods.rotation import tied_gain
from slimlm.methods.widths import BLOCK, COARSE, COARSEST, Layout, Widths
from slimlm.recipe import SliceStep
from slimlm.stream import Stream
from slimlm.walk import StreamedModel
from slimlm.work import Work

GRANULES = (32, 16, 8, 4, 2, 1)
DEARER = 1.05  # a split that every format and kernel takes is preferred to one that costs so much less
POINTS = {"hidden": 4, "mlp": 3, "groups": 2, "blocks": 2, "tied": 1}
CUTS = sum(POINTS.values()) + 2  # streams: one for each, the dense one, and the one to find what to delete from
WINDOWS = 24  # held out, to measure a curve on, and as many to find what to delete from
REFIT_LEAVES = {"hidden": 0.75, "tied": 0.25}  # of what cutting costs, the share that the refit does not win back


@dataclass(frozen=True)
class Cut:
    """One width cut alone: how many units of which axis are gone."""

    axis: str
    removed: int


def candidates(layout: Layout, recipe: SliceStep) -> list[Widths]:
    """All splits that remove the requested share of the parameters, to TOLERANCE; blocks counted from the front.

    Widths are multiples of `--round-to`, by default of 32, or the largest smaller power of two that gets there. With
    `budget: hidden`, and without the refit that would make up for deleted neurons, the one nearest hidden_size.
    """
    for granule in (recipe.round_to,) if recipe.round_to else GRANULES:
        if recipe.budget == "hidden" or not recipe.refit:
            found = _narrower(layout, recipe.sparsity, granule)
            found = sorted(found, key=lambda split: abs(removed_share(layout, split) - recipe.sparsity))[:1]
        else:
            found = list(_splits(layout, recipe.sparsity, granule))
        if found:
            return found
    return []


def removed_share(layout: Layout, widths: Widths) -> float:
    return 1 - layout.parameters(widths) / parameter_count(layout.model.model)


def _narrower(layout: Layout, sparsity: float, granule: int) -> list[Widths]:
    dense, multiple = layout.dense, math.lcm(granule, layout.divisor(layout.dense.groups))
    sizes = range(multiple, dense.hidden, multiple) if layout.narrows else ()
    widths = (replace(dense, hidden=hidden) for hidden in sizes)
    return [split for split in widths if is_near(removed_share(layout, split), sparsity)]


def _splits(layout: Layout, sparsity: float, granule: int) -> Iterator[Widths]:
    dense = layout.dense
    ties = (False, True) if layout.ties_rotated and not layout.is_even else (False,)
    target = (1 - sparsity) * parameter_count(layout.model.model)
    for depth, groups, hidden in _stacks(layout, sparsity, granule):
        for tied in ties if hidden < dense.hidden else (False,):
            whole = Widths(hidden, dense.mlp, groups, tuple(range(depth)), tied)
            for split in _with_mlp(layout, whole, target, granule):
                if split != dense and is_near(removed_share(layout, split), sparsity):
                    yield split


def _stacks(layout: Layout, sparsity: float, granule: int) -> Iterator[tuple[int, int, int]]:
    """Blocks, key/value groups and hidden_size that a split may leave."""
    dense, blocks = layout.dense, len(layout.dense.blocks)
    whole = layout.model.family.numbered or "blocks" in layout.fixed
    least = blocks if whole else max(1, math.ceil(blocks * (1 - sparsity)))
    fewest = dense.groups if "groups" in layout.fixed else 1
    for depth, groups in itertools.product(
        range(blocks, least - 1, -1), range(dense.groups, fewest - 1, -1) if dense.groups else (0,)
    ):
        if groups < dense.groups and layout.attention(groups) % granule:
            continue
        divisor = layout.divisor(groups)
        multiple = math.lcm(granule, divisor)
        narrower = range((dense.hidden - 1) // multiple * multiple, 0, -multiple) if layout.narrows else ()
        for hidden in narrower if dense.hidden % divisor else (dense.hidden, *narrower):
            yield depth, groups, hidden


def _with_mlp(layout: Layout, widths: Widths, target: float, granule: int) -> list[Widths]:
    """MLP widths that bring the parameters near to `target`: the nearest multiple, and the nearest that suits all
    (`suits_all`) where there are such. None when even the least is too much."""
    if not widths.mlp or "mlp" in layout.fixed:
        return [widths]
    whole, none = (layout.parameters(replace(widths, mlp=mlp)) for mlp in (widths.mlp, 0))
    if none >= target:
        return []
    exact = (target - none) / ((whole - none) / widths.mlp)
    if exact >= widths.mlp:
        return [widths]
    coarse = (COARSE, COARSEST) if granule == BLOCK else ()
    steps = [math.lcm(step, layout.mlp_divisor) for step in (granule, *coarse) if step <= widths.mlp]
    sizes = {max(1, min(widths.mlp // step, round(exact / step))) * step for step in steps}
    return [replace(widths, mlp=mlp) for mlp in sorted(sizes)]


def choose(
    layout: Layout, splits: list[Widths], found: Basis, batches: list[Tensor], work: Work, refit: bool = True
) -> tuple[Widths, dict[str, object]]:
    """The split with the least predicted loss, and the figures it was chosen by. refit: whether that follows.

    One that all formats and kernels take is chosen where it costs hardly more.
    """
    influence = found.influence
    if len(splits) == 1:
        return replace(splits[0], blocks=_kept(influence, len(splits[0].blocks))), {}
    curves = loss_curves(layout, splits, found, batches, work)
    for axis, share in REFIT_LEAVES.items() if refit else ():
        curves[axis] = curves[axis].scaled(share)
    scored = sorted((predicted_loss(curves, removed(layout, split)), index) for index, split in enumerate(splits))
    near = [entry for entry in scored if entry[0] <= DEARER * scored[0][0] and layout.suits_all(splits[entry[1]])]
    scored.remove(chosen := (near or scored)[0])
    best = splits[chosen[1]]
    notes = {
        "curves": {axis: [list(point) for point in curve.points] for axis, curve in curves.items()},
        "curve_errors": {axis: list(curve.errors) for axis, curve in curves.items()},
        "predicted_loss": chosen[0],
        "splits": len(splits),
        "next": [f"{splits[index]}: {loss:.4f}" for loss, index in scored[:3]],
    }
    return replace(best, blocks=_kept(influence, len(best.blocks))), notes


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


def _kept(influence: Tensor, depth: int) -> tuple[int, ...]:
    """The `depth` blocks that change the stream most, in order."""
    return tuple(sorted(influence.argsort(descending=True, stable=True)[:depth].tolist()))


@torch.no_grad()
def loss_curves(
    layout: Layout, splits: list[Widths], found: Basis, batches: list[Tensor], work: Work
) -> dict[str, LossCurve]:
    """For each axis that a split cuts, the measured rise of the held-out loss at a few sizes."""
    model = layout.model
    cuts = [
        Cut(axis, units)
        for axis, count in POINTS.items()
        for units in _points(axis, [removed(layout, split)[axis] for split in splits], count)
    ]
    learn, test = held_out_windows(batches)
    work.progress.stage("measuring widths", len(model.blocks))
    learning = model.embed(learn, work.scratch("learning", model.device))
    streams = {cut: model.embed(test, work.scratch(f"cut-{cut}", model.device)) for cut in [None, *cuts]}
    for cut, stream in streams.items():
        if cut is not None:
            _cut_at_start(layout, cut, found, stream)
    for index in range(len(model.blocks)):
        start = time.perf_counter()
        with model.block(index):
            _through_cut_block(layout, index, found, learning, streams)
        work.progress.step()
        work.progress.done("cut", model.family.block(index), time.perf_counter() - start)
    losses = {cut: model.nll(stream) / (test[0].shape[1] - 1) for cut, stream in streams.items()}
    work.clear_scratch()
    return {
        axis: measured_curve([(cut.removed, losses[cut]) for cut in cuts if cut.axis == axis], losses[None])
        for axis in POINTS
    }


def measured_curve(losses: Sequence[tuple[int, Tensor]], dense: Tensor) -> LossCurve:
    """From the mean loss of each window, [windows], behind so many removed units and in the dense model."""
    rises = [rise_of(loss, dense) for _, loss in losses]
    points = [(units, rise) for (units, _), (rise, _) in zip(losses, rises, strict=True)]
    return LossCurve(points, [error for _, error in rises])


def _cut_at_start(layout: Layout, cut: Cut, found: Basis, stream: Stream) -> None:
    """What a cut does to what the embedding gives."""
    model = layout.model
    if cut.axis == "tied":
        gain = tied_gain(model).to(model.device, model.dtype)
        for number, hidden in enumerate(stream.hidden):
            stream.hidden.replace(number, hidden * gain)
        stream.hidden.turn()
    if cut.axis == "hidden":
        kept = found.of(layout.dense.hidden - cut.removed).to(model.device, model.dtype)
        for number, hidden in enumerate(stream.hidden):
            stream.hidden.replace(number, hidden @ kept @ kept.T)
        stream.hidden.turn()


def _through_cut_block(
    layout: Layout, index: int, found: Basis, learning: Stream, streams: Mapping[Cut | None, Stream]
) -> None:
    """Every stream past block `index`, its weights loaded, cut as the stream says."""
    model = layout.model
    orders = {
        name: _Order(layout, name, index)
        for name, axis in layout.axes.items()
        if any(cut and cut.axis == name for cut in streams) and model.anatomy[index].has(axis)
    }
    names = [name for order in orders.values() for name in order.matrices]
    grams = input_statistics(model, index, learning, names, onward=True).statistics
    for axis, order in orders.items():
        for count, weight in order.weights(grams, sorted(cut.removed for cut in streams if cut and cut.axis == axis)):
            with model.placed(model.family.block(index), {order.parameter: weight}):
                model.advance(index, streams[Cut(axis, count)])
    for cut, stream in streams.items():
        if cut and (cut.axis in orders or (cut.axis == "blocks" and index not in _left(found, cut))):
            continue
        changed = _projected(model, index, found, cut.removed) if cut and cut.axis == "hidden" else {}
        with model.placed(model.family.block(index), changed):
            model.advance(index, stream)


def _points(axis: str, sizes: list[int], count: int) -> list[int]:
    """Sizes to measure a curve at, for the sizes that splits ask for."""
    largest = max(sizes)
    return spaced(largest, math.gcd(*sizes), count) if largest else []


def held_out_windows(batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Batches to find what to delete from, and held-out ones to measure on (the same where there are too few)."""
    tokens = torch.cat(batches)
    held = held_out(len(tokens))
    size = len(batches[0])
    learn = tokens[~held][:WINDOWS]
    test = tokens[held][:WINDOWS] if held.any() else learn
    return list(learn.split(size)), list(test.split(size))


class _Order:
    """What to delete of one axis of a block, from the inputs of the linear, or of the experts, that it narrows."""

    def __init__(self, layout: Layout, name: str, index: int) -> None:
        narrowed, anatomy = layout.axes[name].columns[0], layout.model.anatomy[index]
        self.is_packed = narrowed not in anatomy.writers
        self.parameter = narrowed if self.is_packed else f"{narrowed}.weight"
        names = anatomy.experts.writing if anatomy.experts and self.is_packed else (narrowed,)
        self.matrices = {name: matrix(layout.model.blocks[index], name) for name in names}
        self.size = self.matrices[names[0]].shape[1] // layout.dense.of(name)

    def weights(self, grams: dict[str, Tensor], counts: list[int]) -> Iterator[tuple[int, Tensor]]:
        """The parameter without the first so many units to go, its own of every expert: (number, parameter) for each,
        ascending. To be used before the next is asked for.

        grams: of the matrices' inputs [in, in], each used up; an expert that no token reached has none.
        """
        if not self.is_packed:
            ((name, weight),) = self.matrices.items()
            for gone, left in removals(grams.pop(name), weight, self.size, counts):
                yield len(gone), left
            return
        like = next(iter(self.matrices.values()))
        packed = {count: like.new_empty(len(self.matrices), *like.shape) for count in counts}
        for expert, (name, weight) in enumerate(self.matrices.items()):
            gram = (
                grams.pop(name)
                if name in grams
                else torch.eye(weight.shape[1], dtype=torch.float32, device=weight.device)
            )
            for gone, left in removals(gram, weight, self.size, counts):
                packed[len(gone)][expert] = left
        yield from packed.items()


def _projected(model: StreamedModel, index: int, found: Basis, removed: int) -> dict[str, Tensor]:
    """What writes to the stream in a block, by name within it, without the last so many directions."""
    kept = found.of(len(found.vectors) - removed).to(model.device, model.dtype)
    weights = model.weights(index)
    return {name: kept @ (kept.T @ weights[name]) for name in model.anatomy[index].writing if name in weights}


def _left(found: Basis, cut: Cut) -> tuple[int, ...]:
    """Blocks that a cut of these leaves."""
    return _kept(found.influence, len(found.influence) - cut.removed)
