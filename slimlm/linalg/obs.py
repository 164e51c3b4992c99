"""Optimal brain surgeon updates of one matrix: minimise tr((V - W) H (V - W)^T) over V with zeros where a mask says.

W: [out, in], H: [in, in] positive definite, pruned: [out, in] bool. W need not be the dense weight: the minimiser of
any quadratic with this H will do, such as a least-squares fit to what the dense model computes.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
from torch import Tensor

from slimlm.linalg.hessian import Hessian, Rows
from slimlm.linalg.masks import Tile, pooled, spread_out

logger = logging.getLogger(__name__)

BATCH_ELEMENTS = 1 << 23  # of the rows' own inverses held at once
ITERATIONS = 200  # of conjugate gradients, at most
TOLERANCE = 2e-2  # error in the norm of H, of the root of a row's loss, at which they end
ROUGHLY = 1e-1  # the same while a mask is still being refined
PAIRS = 16  # of what might be swapped in a row, looked at in a round; an eighth of a wide one's inputs
LEAST = 30  # units of rounding of a row's weights, below which its error is not followed
# (scores of some neighbouring columns, the first column) -> what to prune of them
Choice = Callable[[Annotated[Tensor, "out width"], int], Annotated[Tensor, "out width", bool]]


def left_to_right(
    weight: Annotated[Tensor, "out in"], hessian: Hessian, choose: Choice, width: int = 128, every: int = 0
) -> tuple[Annotated[Tensor, "out in"], Annotated[Tensor, "out in", bool]]:
    """SparseGPT (Frantar & Alistarh, arXiv 2301.00774, algorithm 1): the pruned weight, and what is pruned.

    Columns are settled in order; what a pruned weight did is passed on to the columns right of it, to those beyond a
    block of `width` once it is done. choose: says for `every` columns at once (a divisor of width; all by default) what
    to prune of them, from the OBS scores w^2 / [H^-1]_cc among the columns from c on.
    """
    every = every or width
    weight, upper = weight.clone(), hessian.upper
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        columns, block = weight[:, start:stop], upper[start:stop, start:stop]
        mask, errors = pruned[:, start:stop], torch.zeros_like(columns)
        for column in range(stop - start):
            if column % every == 0:
                group = slice(column, column + every)
                mask[:, group] = choose((columns[:, group] / block.diagonal()[group]).square(), start + column)
            gone = columns[:, column] * mask[:, column] / block[column, column]
            columns[:, column:] -= gone[:, None] * block[column, column:]
            errors[:, column] = gone
        columns.masked_fill_(mask, 0)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight, pruned


def greedy_order(
    weight: Annotated[Tensor, "out in"], hessian: Hessian, count: int, group: int = 0, most: int = 0
) -> tuple[Annotated[Tensor, "out {count}", int], Annotated[Tensor, "out {count}"]]:
    """OBC (Frantar et al., arXiv 2208.11580, algorithm 1): per row, columns in the order they go, and what each costs.

    A cost is w^2 / (2 [H^-1]_cc) when its turn came. Every row has an inverse of its own, downdated after each column.
    group, most: of so many neighbouring columns only so many may go.
    """
    order = torch.empty(weight.shape[0], count, dtype=torch.long, device=weight.device)
    cost = torch.empty(weight.shape[0], count, dtype=weight.dtype, device=weight.device)
    inverse, inputs = hessian.inverse, weight.shape[1]
    rows = max(1, BATCH_ELEMENTS // (inputs * inputs))
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].clone()
        row = torch.arange(part.shape[0], device=weight.device)
        own = inverse.repeat(part.shape[0], 1, 1)
        gone = torch.zeros_like(part, dtype=torch.bool)
        barred = gone
        for step in range(count):
            scores = part.square() / own.diagonal(dim1=1, dim2=2)
            column = scores.masked_fill(barred, torch.inf).argmin(1)
            order[start + row, step], cost[start + row, step] = column, scores[row, column] / 2
            direction, pivot = own[row, column], own[row, column, column]
            part -= direction * (part[row, column] / pivot)[:, None]
            own -= direction[:, :, None] * (direction / pivot[:, None])[:, None, :]
            gone[row, column] = True
            part[gone] = 0
            own.diagonal(dim1=1, dim2=2)[gone] = 1  # what rounding left of them must not be divided by
            if group:
                full = gone.view(-1, inputs // group, group).sum(2) == most
                barred = gone | full.repeat_interleave(group, dim=1)
    return order, cost


def cheapest_first(
    order: Annotated[Tensor, "out count", int], cost: Annotated[Tensor, "out count"], total: int, inputs: int
) -> Annotated[Tensor, "out {inputs}", bool]:
    """Mask of the `total` weights that are cheapest when each row goes in its own order (OBC, section 4).

    A row's k-th weight goes only after its first k - 1: its cost counts as the largest so far.
    """
    rising = cost.cummax(1).values
    place = rising.flatten().argsort(stable=True)[:total]
    counts = torch.bincount(place // cost.shape[1], minlength=cost.shape[0])
    going = torch.arange(cost.shape[1], device=cost.device) < counts[:, None]
    pruned = torch.zeros(cost.shape[0], inputs, dtype=torch.bool, device=cost.device)
    rows = torch.arange(cost.shape[0], device=cost.device)[:, None].expand_as(order)
    pruned[rows[going], order[going]] = True
    return pruned


@dataclass(frozen=True)
class Solved:
    """A minimiser on a mask as far as it was followed, the gradient H (W - V) there, and each row's loss."""

    found: Annotated[Tensor, "out in"]
    gradient: Annotated[Tensor, "out in"]
    loss: Annotated[Tensor, "out"]

    def those(self, rows: Rows) -> "Solved":
        """Some rows' own."""
        return Solved(*(one[rows] for one in vars(self).values()))

    def put(self, rows: Annotated[Tensor, "rows", int], other: "Solved") -> None:
        """Have the other as these rows' own, in place."""
        if other is not self:
            for one, new in zip(vars(self).values(), vars(other).values(), strict=True):
                one[rows] = new


@dataclass
class _Going:
    """Conjugate gradients of some rows, each by itself: how far they are, and what they go by."""

    hessian: Hessian
    at: Solved
    kept: Annotated[Tensor, "rows in"]
    rounding: Annotated[Tensor, "rows"]
    direction: Annotated[Tensor, "rows in"]
    product: Annotated[Tensor, "rows"]

    def those(self, rows: Rows) -> "_Going":
        """Some of them, to go on with."""
        hessian, at, *tensors = vars(self).values()
        return _Going(hessian.rows(rows), at.those(rows), *(tensor[rows] for tensor in tensors))

    def step(self, going: Annotated[Tensor, "rows", bool]) -> None:
        """Let those that are going take one."""
        tiny, at = torch.finfo(self.kept.dtype).tiny, self.at
        image = self.hessian.apply(self.direction)
        length = going * self.product / (self.direction * image).sum(1).clamp_min(tiny)
        at.found.addcmul_(length[:, None], self.direction)
        at.gradient.addcmul_(length[:, None], image, value=-1)
        at.loss.sub_(length * self.product)
        residual = torch.mul(at.gradient, self.kept, out=image)
        step = (residual @ self.hessian.inverse).mul_(self.kept)
        before, self.product = self.product, (residual * step).sum(1)
        self.direction = step.addcmul((self.product / before.clamp_min(tiny))[:, None], self.direction)


def joint(
    weight: Annotated[Tensor, "out in"],
    hessian: Hessian,
    pruned: Annotated[Tensor, "out in", bool],
    start: Annotated[Tensor, "out in"] | None = None,
    tolerance: float = TOLERANCE,
) -> Solved:
    """The minimiser on a mask: V_K = H_KK^-1 (H W)_K for each row's kept weights K. start: near it.

    Conjugate gradients (Hestenes & Stiefel 1952) for all rows at once, preconditioned by (H^-1)_KK, which is (H_KK)^-1
    but for what pruned and kept inputs have to do with one another. A row ends when the error, in the norm of H, is
    `tolerance` of the root of its loss, whatever the others do: a good start saves iterations. Once half of the rows
    are done, products are of the others alone. Rows that do not get there in ITERATIONS are said in the log, with how
    far they came. A dead input's weight is zero.
    """
    kept = (~(pruned | hessian.dead)).to(weight.dtype)
    found = (weight if start is None else start) * kept
    gradient = hessian.apply(weight - found)
    loss = ((weight - found) * gradient).sum(1)
    rounding = (LEAST * torch.finfo(weight.dtype).eps) ** 2 * (weight.square() @ hessian.matrix.diagonal())
    residual = gradient * kept
    step = (residual @ hessian.inverse).mul_(kept)
    solved = Solved(found, gradient, loss)
    some = _Going(hessian, solved, kept, rounding, step, (residual * step).sum(1))
    place = torch.arange(len(weight), device=weight.device)
    for _ in range(ITERATIONS):
        small = (tolerance**2 * some.at.loss).maximum(some.rounding)
        going = some.product > small
        count = int(going.sum())
        if not count:
            break
        if 2 * count <= len(place):
            solved.put(place, some.at)
            place, some, small, going = place[going], some.those(going), small[going], going[going]
        some.step(going)
    else:
        _say_unfinished(some.product, small, tolerance, len(weight))
    solved.put(place, some.at)
    return solved


def _say_unfinished(product: Tensor, small: Tensor, tolerance: float, count: int) -> None:
    """product: [rows], squares of the errors of rows that were going; small: [rows], what they were to come to. count:
    of all rows."""
    if unfinished := int((product > small).sum()):
        reached = tolerance * float((product / small.clamp_min(torch.finfo(small.dtype).tiny)).max().sqrt())
        logger.warning(
            "%d of %d rows are solved to %.1e instead of %.0e: conjugate gradients ended after %d iterations",
            *(unfinished, count, reached, tolerance, ITERATIONS),
        )


@runtime_checkable
class Inverse(Protocol):
    """An inverse curvature of a matrix's rows, shared by them or one for each."""

    def diagonal(self) -> Annotated[Tensor, "in"] | Annotated[Tensor, "out in"]:
        """Of the inverse, or of each row's own."""

    def times(self, vector: Annotated[Tensor, "out in"]) -> Annotated[Tensor, "out in"]:
        """F^-1 x, row by row."""


def summed(
    weight: Annotated[Tensor, "out in"], inverse: Inverse, pruned: Annotated[Tensor, "out in", bool]
) -> Annotated[Tensor, "out in"]:
    """One OBS step for all pruned weights at once, each as if it went alone: V = W - sum_p w_p / [F^-1]_pp F^-1_p.

    WoodFisher (Singh & Alistarh, arXiv 2004.14340, eq. 12) and M-FAC (arXiv 2107.03356, section 3). Correlations
    between pruned weights are left out: `joint` has them.
    """
    return (weight - inverse.times(weight * pruned / inverse.diagonal())).masked_fill_(pruned, 0)


def swapped(
    weight: Annotated[Tensor, "out in"],
    hessian: Hessian,
    pruned: Annotated[Tensor, "out in", bool],
    solved: Solved,
    group: int = 0,
    tile: Tile = (1, 1),
) -> tuple[Solved, Annotated[Tensor, "out in", bool], Annotated[Tensor, "out", bool]]:
    """One refinement of a mask: weights that are cheap to lose for ones that would win more. What is solved on another
    mask, that mask, and which rows are better for it; the others are to keep what they have.

    solved: jointly on `pruned`. Losing kept weight k costs v_k^2 / [H_KK^-1]_kk; gaining pruned weight p wins
    g_p^2 / s_p, with g the gradient H (W - V) and s_p >= 1 / [H^-1]_pp what is left of H_pp after K; the middle of the
    two bounds of s_p is taken. Pairs are made in each row from the surest on while they win (with `group`, one within
    each group of that many columns): of the first PAIRS, or eighth, a quarter of what would win at a time. tile: rows
    and columns of what is lost and gained as one, a row of tiles then being what is a row else.
    """
    inverse = hessian.inverse.diagonal()
    spread = (hessian.matrix.diagonal() / inverse).sqrt()  # geometric mean of H_pp and 1 / [H^-1]_pp
    is_pruned = pruned[:: tile[0], :: tile[1]]
    gain = pooled(solved.gradient.square() / spread, tile).masked_fill(~is_pruned, -torch.inf)
    cost = pooled(solved.found.square() * spread, tile).masked_fill(is_pruned, torch.inf)
    shape = (-1, group or gain.shape[1])
    pairs = 1 if group else min(shape[1], max(PAIRS, shape[1] // 8))
    best_gain, incoming = gain.view(shape).topk(pairs)
    least_cost, outgoing = cost.view(shape).topk(pairs, largest=False)
    wins = best_gain > least_cost
    chosen = torch.arange(pairs, device=wins.device) < -(-wins.sum(1, keepdim=True) // 4)
    rows = torch.arange(len(wins), device=wins.device)[:, None].expand_as(chosen)
    mask = is_pruned.reshape(shape).clone()
    mask[rows[chosen], incoming[chosen]] = False
    mask[rows[chosen], outgoing[chosen]] = True
    mask = spread_out(mask.view(is_pruned.shape), tile)
    other = joint(weight, hessian, mask, solved.found, ROUGHLY)
    before, after = (one.loss.view(-1, tile[0]).sum(1) for one in (solved, other))
    return other, mask, (after < before).repeat_interleave(tile[0])
