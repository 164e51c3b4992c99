"""Which widths give a requested sparsity: all splits of it over the stream, the MLP, key/value groups and blocks."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from slimlm.errors import UserError
from slimlm.linalg.budget import is_near
from slimlm.recipe import SliceStep
from slimlm.slice.config import narrows
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import BLOCK, COARSE, COARSEST, Layout, Widths

GRANULES = (32, 16, 8, 4, 2, 1)
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
    names = ", ".join(f"{name} {row}" for name, row in uneven[0].items()) if len(splits) == 1 else "these"
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
    layout = shapes.layout
    dense, multiple = layout.dense, math.lcm(granule, layout.divisor(layout.dense.groups))
    sizes = range(multiple, dense.hidden, multiple) if narrows(layout) else ()
    widths = (replace(dense, hidden=hidden) for hidden in sizes)
    return [split for split in widths if is_near(shapes.removed_share(split), sparsity)]


def _splits(shapes: Shapes, sparsity: float, granule: int) -> Iterator[Widths]:
    layout, dense = shapes.layout, shapes.dense
    ties = (False, True) if layout.ties_rotated and not layout.is_even else (False,)
    target = (1 - sparsity) * shapes.whole
    for depth, groups, hidden in _stacks(layout, sparsity, granule):
        for tied in ties if hidden < dense.hidden else (False,):
            whole = Widths(hidden, dense.mlp, groups, tuple(range(depth)), tied)
            for split in _with_mlp(shapes, whole, target, granule):
                if split != dense and is_near(shapes.removed_share(split), sparsity):
                    yield split


def _stacks(layout: Layout, sparsity: float, granule: int) -> Iterator[tuple[int, int, int]]:
    """Blocks, key/value groups and hidden_size that a split may leave."""
    dense, blocks = layout.dense, len(layout.dense.blocks)
    whole = layout.family.numbered or "blocks" in layout.fixed
    least = blocks if whole else max(1, math.ceil(blocks * (1 - sparsity)))
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
    coarse = (COARSE, COARSEST) if granule == BLOCK else ()
    steps = [math.lcm(step, layout.mlp_divisor) for step in (granule, *coarse) if step <= widths.mlp]
    sizes = {max(1, min(widths.mlp // step, round(exact / step))) * step for step in steps}
    return [replace(widths, mlp=mlp) for mlp in sorted(sizes)]


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
