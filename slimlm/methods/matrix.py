"""Pruning the matrices of one input: curvature x mask x update.

Linears that read the same input (query, key and value; gate and up) share its Gram matrix and everything computed from
it, and are pruned as one tall matrix: their rows do not know of each other. How many weights go is settled per matrix.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from slimlm.errors import RunFailure
from slimlm.linalg.hessian import DAMPING, Hessian, SingularCurvature, hessian, with_gradients
from slimlm.linalg.masks import Tile, pooled, smallest, smallest_per_group, smallest_per_row, spread, spread_out
from slimlm.linalg.obs import ROUGHLY, Inverse, cheapest_first, greedy_order, joint, left_to_right, summed, swapped
from slimlm.methods.fisher import TokenGradients
from slimlm.recipe import CurvatureName, MaskName, PruneStep, UpdateName

Known = Hessian | Inverse | Tensor | None
CHUNK_ELEMENTS = 1 << 24  # of a weight whose rows are solved for at once
COLUMNS = 128  # of which SparseGPT chooses a mask at once


@dataclass(frozen=True)
class Choice:
    """One row of the table of methods.

    curvature: what is known of the loss. `diagonal` and `gram` are of the inputs' second moments; `fisher` and
    `block-fisher` of per-token gradients, row by row; `gram+fisher` adds those to the Gram as a low-rank term.
    mask: `magnitude` |w| in the matrix; `wanda` |w| ||x|| in the row; `obs` w^2 / [H^-1] in the matrix; `columns` the
    same in blocks of columns, on the way from left to right; `greedy` weight after weight with exact downdates.
    update: what the kept weights do about it. `joint` is optimal for the mask, and so what greedy downdates come to.
    swaps: times that the mask is refined by swaps, each followed by a joint update.
    """

    curvature: CurvatureName
    mask: MaskName
    update: UpdateName
    swaps: int = 0

    @property
    def goes_left_to_right(self) -> bool:
        """Whether nothing of the curvature is needed but the factor that columns are settled by."""
        return self.curvature == "gram" and self.mask == "columns" and self.update in ("left-to-right", "none")


def choice_of(step: PruneStep) -> Choice:
    return Choice(step.curvature, step.mask, step.update, step.swaps)


@dataclass(frozen=True)
class Pattern:
    """How much goes: of each matrix its count of weights; or all but `keep` of every `group` neighbours in a row.

    tile: rows and columns of what goes or stays as one; counts are then of whole tiles' weights.
    """

    counts: tuple[int, ...]
    keep: int = 0
    group: int = 0
    tile: Tile = (1, 1)

    def smallest(self, scores: Tensor, count: int) -> Tensor:
        """Mask of `count` weights, or as many as whole tiles come to, with the smallest scores: [out, in]."""
        return spread_out(smallest(pooled(scores, self.tile), count // math.prod(self.tile)), self.tile)


@dataclass(frozen=True)
class Task:
    """What a run prunes by. pattern: of matrices, by their full names. gradients: of a block's linears, where the
    choice looks at gradients. reorders: whether neurons are to be gathered first."""

    choice: Choice
    pattern: Callable[[list[str]], Pattern]
    dtype: str = "auto"  # to write in
    gradients: Callable[[int], Mapping[str, TokenGradients]] = lambda index: {}
    reorders: bool = False


def prune_tall(
    weight: Tensor, rows: Sequence[int], pattern: Pattern, choice: Choice, curvature: Known
) -> tuple[Tensor, Tensor]:
    """Prune matrices stacked to weight: [out, in], of so many `rows` each: the pruned weight, and what is pruned.

    curvature: the damped Gram; an inverse for `obs` and `summed`; the inputs' norms [in] for `wanda`; None for
    `magnitude` without an update.
    """
    if len(rows) > 1 and weight.numel() > CHUNK_ELEMENTS:  # one after another: copies of the whole would be too large
        return _one_by_one(weight, rows, pattern, choice, curvature)
    if isinstance(curvature, Hessian) and curvature.dead.any():
        # What a dead input meets does not matter: it goes first, and what need not go stays as it is.
        found, pruned = _prune_tall(weight.masked_fill(curvature.dead, 0), rows, pattern, choice, curvature)
        return torch.where(curvature.dead & ~pruned, weight, found), pruned
    return _prune_tall(weight, rows, pattern, choice, curvature)


def _prune_tall(
    weight: Tensor, rows: Sequence[int], pattern: Pattern, choice: Choice, curvature: Known
) -> tuple[Tensor, Tensor]:
    if choice.mask == "columns":
        assert isinstance(curvature, Hessian)
        choose = partial(_in_columns, rows=rows, pattern=pattern, inputs=weight.shape[1])
        columns = pattern.group or pattern.tile[1] * max(1, COLUMNS // pattern.tile[1])
        found, pruned = left_to_right(weight, curvature, choose, columns)
    elif choice.mask == "greedy":
        assert isinstance(curvature, Hessian)
        found, pruned = weight, _greedily(weight, rows, pattern, curvature)
    else:
        found, pruned = weight, _by_scores(_scores(weight, choice, curvature), rows, pattern, choice)
    return _updated(weight, found, pruned, pattern, choice, curvature)


def _one_by_one(
    weight: Tensor, rows: Sequence[int], pattern: Pattern, choice: Choice, curvature: Known
) -> tuple[Tensor, Tensor]:
    found, pruned = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
    for place, (count, own) in enumerate(zip(rows, pattern.counts, strict=True)):
        part = slice(sum(rows[:place]), sum(rows[:place]) + count)
        known = curvature.rows(part) if isinstance(curvature, Hessian) else curvature
        one = replace(pattern, counts=(own,))
        found[part], pruned[part] = prune_tall(weight[part], [count], one, choice, known)
    return found, pruned


def _updated(
    weight: Tensor, found: Tensor, pruned: Tensor, pattern: Pattern, choice: Choice, curvature: Known
) -> tuple[Tensor, Tensor]:
    if choice.update == "none":
        return weight.masked_fill(pruned, 0), pruned
    if choice.update == "summed":
        assert curvature is not None
        assert not isinstance(curvature, Tensor)
        return summed(weight, curvature, pruned), pruned
    assert isinstance(curvature, Hessian)
    if choice.update == "left-to-right":
        if choice.mask != "columns":
            found, _ = left_to_right(
                weight, curvature, lambda scores, start: pruned[:, start : start + scores.shape[1]]
            )
        return found, pruned
    step = max(1, CHUNK_ELEMENTS // (weight.shape[1] * pattern.tile[0])) * pattern.tile[0]
    parts = [slice(start, start + step) for start in range(0, len(weight), step)]
    solved = [
        _solved(weight[rows], curvature.rows(rows), pruned[rows], found[rows], choice.swaps, pattern) for rows in parts
    ]
    return torch.cat([part for part, _ in solved]), torch.cat([mask for _, mask in solved])


def _solved(
    weight: Tensor, curvature: Hessian, pruned: Tensor, found: Tensor, swaps: int, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """The joint update of some rows, their mask refined before it."""
    for _ in range(swaps):
        found = joint(weight, curvature, pruned, found, ROUGHLY)
        found, pruned = swapped(weight, curvature, pruned, found, pattern.group, pattern.tile)
    return joint(weight, curvature, pruned, found), pruned


def _scores(weight: Tensor, choice: Choice, curvature: Known) -> Tensor:
    scores = weight.abs()
    if choice.mask == "wanda":
        norms = curvature.matrix.diagonal().sqrt() if isinstance(curvature, Hessian) else curvature
        assert isinstance(norms, Tensor)
        return scores * norms
    if choice.mask == "obs":
        assert curvature is not None
        assert not isinstance(curvature, Tensor)
        return weight.square() / curvature.diagonal()
    return scores


def _by_scores(scores: Tensor, rows: Sequence[int], pattern: Pattern, choice: Choice) -> Tensor:
    if pattern.group:
        return smallest_per_group(scores, pattern.keep, pattern.group)
    masks = []
    for part, count in zip(scores.split(list(rows)), pattern.counts, strict=True):
        # Rows differ in scale for no reason of their own once inputs are weighed.
        per_row = choice.mask == "wanda" and pattern.tile == (1, 1)
        masks.append(smallest_per_row(part, spread(count, part.shape[0])) if per_row else pattern.smallest(part, count))
    return torch.cat(masks)


def _in_columns(scores: Tensor, start: int, rows: Sequence[int], pattern: Pattern, inputs: int) -> Tensor:
    """What to prune of some columns: each matrix its share of what it loses in all, to whole weights in the end."""
    if pattern.group:
        return smallest_per_group(scores, pattern.keep, pattern.group)
    stop, masks, area = start + scores.shape[1], [], math.prod(pattern.tile)
    for part, count in zip(scores.split(list(rows)), pattern.counts, strict=True):
        before, after = (count // area * place // inputs * area for place in (start, stop))
        masks.append(pattern.smallest(part, after - before))
    return torch.cat(masks)


def _greedily(weight: Tensor, rows: Sequence[int], pattern: Pattern, hessian: Hessian) -> Tensor:
    inputs = weight.shape[1]
    if pattern.group:
        count = inputs // pattern.group * (pattern.group - pattern.keep)
        order, _ = greedy_order(weight, hessian, count, pattern.group, pattern.group - pattern.keep)
        return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)
    order, cost = greedy_order(weight, hessian, inputs)
    masks = [
        cheapest_first(part, price, count, inputs)
        for part, price, count in zip(order.split(list(rows)), cost.split(list(rows)), pattern.counts, strict=True)
    ]
    return torch.cat(masks)


def curvature_of(
    gram: Tensor,
    name: str,
    damping: float = DAMPING,
    gradients: Sequence[TokenGradients] = (),
    upper_only: bool = False,
) -> Hessian:
    """The damped Gram, and the gradients beside it of linears stacked as in `prune_tall`, if there are any.

    upper_only: as in `hessian`. Raises RunFailure with the linear's name when no damping helps.
    """
    try:
        found = hessian(gram, damping, upper_only)
    except SingularCurvature as error:
        raise RunFailure(f"{name} cannot be pruned: {error}") from error
    return with_gradients(found, gradients[0].x, torch.cat([g.delta for g in gradients], 1)) if gradients else found
