"""Which widths give a requested sparsity: all splits of it over the stream, the MLP, key/value groups and blocks."""

import itertools
import math
import operator
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from slimlm.errors import UserError
from slimlm.linalg.budget import is_near
from slimlm.recipe import SliceStep
from slimlm.slice.config import narrows
from slimlm.slice.decoding import Decoding
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import BLOCK, COARSE, COARSEST, Layout, Widths

GRANULES = (32, 16, 8, 4, 2, 1)
SLACK = 0.02  # of the dense model's time, that a split may be faster than the slowest that is fast enough
Span = tuple[int, int]  # least and most


@dataclass(frozen=True)
class Choice:
    """The splits that a sparsity leaves to choose from: how many, and from which to which width of each axis, how many
    parameters, and bytes of weights they leave; None where there is none, 0 for what the model has not."""

    sparsity: float
    splits: int
    hidden: Span | None = None
    mlp: Span | None = None
    groups: Span | None = None
    blocks: Span | None = None
    parameters: Span | None = None
    bytes: Span | None = None


def splits_for(shapes: Shapes, recipe: SliceStep) -> list[Widths]:
    """The splits a recipe leaves to choose from, blocks counted from the front. Raises UserError where there is none,
    and for widths given by hand that cannot be had."""
    if recipe.widths:
        return [_by_hand(shapes.layout, recipe, choice) for choice in recipe.width_choices]
    if recipe.latency is not None:
        return fast_enough(shapes, recipe)
    splits = candidates(shapes, recipe)
    if not splits:
        steps = f" in multiples of {recipe.round_to}" if recipe.round_to else ""
        raise UserError(f"sparsity {recipe.sparsity:g} cannot be reached{steps}: {_nearest(shapes, recipe)}")
    return splits


def _by_hand(layout: Layout, recipe: SliceStep, given: dict[str, int]) -> Widths:
    """Raises UserError for widths that the model does not have or that the config class refuses."""
    dense = layout.dense
    tied = given.pop("tied", 0) > 0
    if tied and not layout.model.head_is_tied:
        raise UserError("--widths tied=1: the model's head is not tied to its embedding")
    if tied and not layout.ties_rotated:
        raise UserError(
            "--widths tied=1: the norm behind the embedding goes into its table, which the head cannot share"
        )
    for name, width in given.items():
        full = len(dense.blocks) if name == "blocks" else dense.of(name)
        if not 0 < width <= full:
            raise UserError(f"--widths {name}={width}: the model has {full or 'none that can be changed'}")
        if name in layout.fixed and width != full:
            raise UserError(f"--widths {name}: with --skip it stays as it is, since all blocks are cut alike")
    blocks = tuple(range(given.pop("blocks", len(dense.blocks))))
    widths = replace(dense, **given, blocks=blocks, tied=tied)
    if not recipe.refit and (widths.mlp, widths.groups) != (dense.mlp, dense.groups):
        raise UserError("--widths mlp and groups need the refit that makes up for what goes: leave out --no-refit")
    if blocks != dense.blocks and layout.family.numbered:
        raise UserError("--widths blocks: what a block of this model computes depends on its number")
    if widths.mlp != dense.mlp and widths.mlp % layout.mlp_divisor:
        raise UserError(f"--widths mlp={widths.mlp}: experts' width is a multiple of {layout.mlp_divisor}")
    divisor = layout.divisor(widths.groups)
    if widths.hidden != dense.hidden and not layout.family.rotates:
        raise UserError(
            f"--widths hidden={widths.hidden}: hidden_size stays {dense.hidden}, as {layout.model.why_not_rotated}"
        )
    if widths.hidden % divisor:
        raise UserError(f"--widths hidden={widths.hidden}: this kind of model wants a multiple of {divisor}")
    return widths


def _nearest(shapes: Shapes, recipe: SliceStep) -> str:
    """How near one can come, as a hint."""
    layout = shapes.layout
    if not layout.family.rotates and not recipe.refit:
        why = layout.model.why_not_rotated
        return f"{why}; what is left to cut needs the refit that makes up for it: leave out --no-refit"
    near: list[Widths] = []
    for step in range(1, 41):
        for sparsity in (recipe.sparsity - step / 100, recipe.sparsity + step / 100):
            if 0 < sparsity < 1:
                near += candidates(shapes, recipe.model_copy(update={"sparsity": sparsity}))
        if near:
            best = min(near, key=lambda widths: abs(shapes.removed_share(widths) - recipe.sparsity))
            return f"the nearest is {shapes.removed_share(best):.4f} ({best})"
    return "no smaller width is left"


def uneven_line(layout: Layout, splits: list[Widths]) -> str | None:
    """What widths cost that are no multiples of 32, where none of the splits does without."""
    uneven = [layout.uneven(split) for split in splits]
    if not all(uneven):
        return None
    names = (
        ", ".join(f"{name} {row}" for name, row in uneven[0].items())
        if len(splits) == 1
        else "all widths to choose from"
    )
    return (
        f"{names}: no multiple of {BLOCK}, so quantised files (GGUF, int4) will hold such matrices unquantised, and "
        "kernels run them slower"
    )


def candidates(shapes: Shapes, recipe: SliceStep) -> list[Widths]:
    """All splits that remove the requested share of the parameters, to TOLERANCE; blocks counted from the front.

    Widths are multiples of `round_to`, by default of 32, or the largest smaller power of two that gets there. With
    `budget: hidden`, and without the refit that would make up for deleted neurons, the one nearest hidden_size.
    """
    for granule in (recipe.round_to,) if recipe.round_to else GRANULES:
        if recipe.budget == "hidden" or not recipe.refit:
            found = _narrower(shapes, recipe.sparsity, granule)
            found = sorted(found, key=lambda split: abs(shapes.removed_share(split) - recipe.sparsity))[:1]
        else:
            found = list(_splits(shapes, recipe.sparsity, granule))
        if found:
            return found
    return []


def _narrower(shapes: Shapes, sparsity: float, granule: int) -> list[Widths]:
    widths = _of_stream(shapes.layout, granule)
    return [split for split in widths if is_near(shapes.removed_share(split), sparsity)]


def _of_stream(layout: Layout, granule: int) -> list[Widths]:
    """Those in which hidden_size alone is another, ascending."""
    dense, multiple = layout.dense, math.lcm(granule, layout.divisor(layout.dense.groups))
    sizes = range(multiple, dense.hidden, multiple) if narrows(layout) else ()
    return [replace(dense, hidden=hidden) for hidden in sizes]


def _splits(shapes: Shapes, sparsity: float, granule: int) -> Iterator[Widths]:
    layout, dense = shapes.layout, shapes.dense
    target, least = (1 - sparsity) * shapes.whole, math.ceil(len(dense.blocks) * (1 - sparsity))
    for depth, groups, hidden in _stacks(layout, least, granule):
        for tied in _ties(layout, hidden):
            whole = Widths(hidden, dense.mlp, groups, tuple(range(depth)), tied)
            for split in _with_mlp(shapes, whole, target, granule):
                if split != dense and is_near(shapes.removed_share(split), sparsity):
                    yield split


def _ties(layout: Layout, hidden: int) -> tuple[bool, ...]:
    """What a split of this hidden_size may say of the head's tie."""
    is_open = layout.ties_rotated and not layout.is_even and hidden < layout.dense.hidden
    return (False, True) if is_open else (False,)


def _stacks(layout: Layout, least: int, granule: int) -> Iterator[tuple[int, int, int]]:
    """Blocks, key/value groups and hidden_size that a split may leave, most first. least: blocks, if any may go."""
    dense, blocks = layout.dense, len(layout.dense.blocks)
    whole = layout.family.numbered or "blocks" in layout.fixed
    least = blocks if whole else max(1, least)
    fewest = dense.groups if "groups" in layout.fixed else 1
    can_narrow = narrows(layout)
    for depth, groups in itertools.product(
        range(blocks, least - 1, -1), range(dense.groups, fewest - 1, -1) if dense.groups else (0,)
    ):
        if groups < dense.groups and layout.attention(groups) % granule:
            continue
        divisor = layout.divisor(groups)
        multiple = math.lcm(granule, divisor)
        narrower = range((dense.hidden - 1) // multiple * multiple, 0, -multiple) if can_narrow else ()
        for hidden in narrower if dense.hidden % divisor else (dense.hidden, *narrower):
            yield depth, groups, hidden


def _with_mlp(shapes: Shapes, widths: Widths, target: float, granule: int) -> list[Widths]:
    """MLP widths that bring the parameters near to `target`: the nearest multiple, and the nearest that suits all
    (`suits_all`) where there are such. None when even the least is too much."""
    layout = shapes.layout
    if not widths.mlp or "mlp" in layout.fixed:
        return [widths]
    whole, none = (shapes.parameters(replace(widths, mlp=mlp)) for mlp in (widths.mlp, 0))
    if none >= target:
        return []
    exact = (target - none) / ((whole - none) / widths.mlp)
    if exact >= widths.mlp:
        return [widths]
    sizes = {max(1, min(widths.mlp // step, round(exact / step))) * step for step in _steps(layout, granule)}
    return [replace(widths, mlp=mlp) for mlp in sorted(sizes)]


def _steps(layout: Layout, granule: int) -> list[int]:
    """What MLP widths may be multiples of."""
    coarse = (COARSE, COARSEST) if granule == BLOCK else ()
    return [math.lcm(step, layout.mlp_divisor) for step in (granule, *coarse) if step <= layout.dense.mlp]


def fast_enough(shapes: Shapes, recipe: SliceStep) -> list[Widths]:
    """All splits predicted to decode in at most so much of the dense model's time, and hardly less; blocks counted from
    the front. Widths as with a sparsity. Raises UserError where it cannot be that fast."""
    assert recipe.latency is not None
    layout, decoding = shapes.layout, Decoding(shapes)
    most, alone = recipe.latency * decoding.dense, recipe.budget == "hidden" or not recipe.refit

    def found_with(granule: int) -> list[Widths]:
        if not alone:
            return _fast(decoding, most, granule)
        return [split for split in _of_stream(layout, granule) if decoding.of(split) <= most][-1:]

    first, *finer = (recipe.round_to,) if recipe.round_to else GRANULES
    if found := found_with(first):
        return found
    least = _least(layout, recipe.round_to or 1, alone)
    if decoding.of(least) <= most and (found := next(filter(None, map(found_with, finer)), [])):
        return found
    share = decoding.of(least) / decoding.dense
    raise UserError(f"latency {recipe.latency:g} cannot be reached: the least is {share:.4f} ({least})")


def _least(layout: Layout, granule: int, alone: bool) -> Widths:
    """The smallest split. alone: of those in which hidden_size alone is another."""
    if alone:
        return next(iter(_of_stream(layout, granule)), layout.dense)
    *_, (depth, groups, hidden) = _stacks(layout, 1, granule)
    return Widths(hidden, _mlps(layout, granule)[0], groups, tuple(range(depth)))


def _mlps(layout: Layout, granule: int) -> list[int]:
    """All widths that an MLP may have, ascending, the dense one last."""
    dense = layout.dense.mlp
    if not dense or "mlp" in layout.fixed:
        return [dense]
    step = math.lcm(granule, layout.mlp_divisor)
    return [*range(step, dense, step), dense]


def _fast(decoding: Decoding, most: float, granule: int) -> list[Widths]:
    """With each stack, the widest MLP of each kind of step with which it takes at most so many seconds, where that is
    near the slowest of all."""
    layout, dense = decoding.shapes.layout, decoding.shapes.dense
    mlps = _mlps(layout, granule)
    steps = _steps(layout, granule) or [1]
    allowed = torch.tensor([[mlp % step == 0 or mlp == dense.mlp for mlp in mlps] for step in steps])
    # Fewer blocks than meet it by themselves would do nothing for other widths.
    depths = range(1, len(dense.blocks) + 1)
    least = bisect_right(depths, most, key=lambda depth: decoding.of(replace(dense, blocks=dense.blocks[:depth])))
    found: dict[Widths, float] = {}
    for depth, stacks in itertools.groupby(_stacks(layout, least, granule), operator.itemgetter(0)):
        sides = [(hidden, groups) for _, groups, hidden in stacks]
        seconds = decoding.across(depth, sides, mlps)
        fits = (seconds <= most)[:, None] & allowed  # [sides, steps, mlps]
        widest = torch.where(fits, torch.arange(len(mlps)), -1).amax(-1)
        taken = seconds.gather(1, widest.clamp_min(0))
        for (hidden, groups), *own in zip(sides, widest.tolist(), taken.tolist(), strict=True):
            for place, each in zip(*own, strict=True):
                if place >= 0:
                    found[Widths(hidden, mlps[place], groups, tuple(range(depth)))] = each
    slowest = max(found.values(), default=0.0)
    near = [split for split, taken in found.items() if taken >= slowest - SLACK * decoding.dense]
    return [replace(split, tied=tied) for split in near for tied in _ties(layout, split.hidden)]


def axes_of(splits: list[Widths]) -> str:
    """The axes in which splits differ, for a message."""
    axes = ("hidden", "mlp", "groups", "blocks", "tied")
    return ", ".join(name for name in axes if len({split.of(name) for split in splits}) > 1)


def choice_at(shapes: Shapes, share: float) -> Choice:
    """What there is to choose from, told from shapes alone. Raises UserError for weights the family does not
    declare."""
    splits = candidates(shapes, SliceStep.model_validate({"model": "any", "sparsity": share}))
    if not splits:
        return Choice(share, 0)
    left, each = [shapes.parameters(split) for split in splits], shapes.model.checkpoint.main_dtype.itemsize
    widths = ([split.hidden for split in splits], [split.mlp for split in splits], [split.groups for split in splits])
    counts = *widths, [len(split.blocks) for split in splits], left, [each * count for count in left]
    return Choice(share, len(splits), *((min(ends), max(ends)) for ends in counts))
