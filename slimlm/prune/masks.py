"""Which weights go: masks by name, all with the same leading arguments (weight, curvature, quota).

weight: [out, in], matrices of one input one below the other. Each gives the weight as choosing leaves it, [out, in],
and what is pruned, [out, in] bool. What a mask needs of a curvature is what its argument is annotated with.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from slimlm.linalg.hessian import Hessian
from slimlm.linalg.masks import smallest_per_group, smallest_per_row, spread
from slimlm.linalg.obs import cheapest_first, greedy_order
from slimlm.linalg.obs import left_to_right as settle_columns
from slimlm.prune.curvature import Curvature
from slimlm.prune.quota import ALONE, Quota

COLUMNS = 128  # of which SparseGPT chooses a mask at once
Chosen = tuple[Tensor, Tensor]


@runtime_checkable
class HasNorms(Protocol):
    def norms(self) -> Tensor:
        """Of the inputs: [in]."""


@runtime_checkable
class HasDiagonal(Protocol):
    def diagonal(self) -> Tensor:
        """Of the inverse: [in] or [out, in]."""


@runtime_checkable
class HasSquares(Protocol):
    def squares(self) -> Tensor:
        """Mean squares of the gradients: [out, in]."""


def magnitude(weight: Tensor, curvature: Curvature, quota: Quota) -> Chosen:
    """The smallest |w| of each matrix of weight: [out, in] (Han et al., arXiv 1506.02626)."""
    return weight, quota.smallest(weight.abs())


def wanda(weight: Tensor, curvature: HasNorms, quota: Quota) -> Chosen:
    """The smallest |w_ij| ||x_j|| of each row of weight: [out, in] (Sun et al., arXiv 2306.11695, eq. 1), of each
    matrix where tiles go."""
    scores = weight.abs() * curvature.norms()
    if quota.tile != ALONE or quota.group:
        return weight, quota.smallest(scores)
    parts = zip(scores.split(quota.rows), quota.counts, strict=True)
    return weight, torch.cat([smallest_per_row(part, spread(count, len(part))) for part, count in parts])


def obs(weight: Tensor, curvature: HasDiagonal, quota: Quota) -> Chosen:
    """The smallest w^2 / [H^-1] of each matrix of weight: [out, in] (Hassibi & Stork 1992)."""
    return weight, quota.smallest(weight.square() / curvature.diagonal())


def columns(weight: Tensor, curvature: Hessian, quota: Quota) -> Chosen:
    """The same of weight: [out, in], in blocks of columns, on the way from left to right (SparseGPT, arXiv 2301.00774,
    algorithm 1), those to come making up for what went; each matrix its share of what it loses in all, to whole weights
    in the end."""
    inputs, area = weight.shape[1], math.prod(quota.tile)

    def choose(scores: Tensor, start: int) -> Tensor:
        if quota.group:
            return smallest_per_group(scores, quota.keep, quota.group)
        masks, stop = [], start + scores.shape[1]
        for part, count in zip(scores.split(quota.rows), quota.counts, strict=True):
            before, after = (count // area * place // inputs * area for place in (start, stop))
            masks.append(quota.smallest_tiles(part, after - before))
        return torch.cat(masks)

    unit = quota.group or quota.tile[1]
    return settle_columns(weight, curvature, choose, unit * max(1, COLUMNS // unit), quota.group)


def greedy(weight: Tensor, curvature: Hessian, quota: Quota) -> Chosen:
    """Weight after weight of [out, in] with exact downdates, then the cheapest of all rows (OBC, arXiv 2208.11580)."""
    inputs = weight.shape[1]
    if quota.group:
        most = quota.group - quota.keep
        order, _ = greedy_order(weight, curvature, inputs // quota.group * most, quota.group, most)
        return weight, torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)
    order, cost = greedy_order(weight, curvature, inputs)
    parts = zip(order.split(quota.rows), cost.split(quota.rows), quota.counts, strict=True)
    return weight, torch.cat([cheapest_first(part, price, count, inputs) for part, price, count in parts])


def taylor(weight: Tensor, curvature: HasSquares, quota: Quota) -> Chosen:
    """The smallest mean over gradients g of (w g)^2: [out, in] (Molchanov et al., arXiv 1906.10771, section 3.1)."""
    return weight, quota.smallest(weight.square() * curvature.squares())


def random(weight: Tensor, curvature: Curvature, quota: Quota) -> Chosen:
    """Any weights of each matrix [out, in]: what a method has to beat."""
    scores = [
        torch.rand(weight[rows].shape, generator=torch.Generator().manual_seed(own.seed)) for rows, own in quota.apart()
    ]
    return weight, quota.smallest(torch.cat(scores).to(weight.device))


Mask = Callable[[Tensor, Any, Quota], Chosen]
MASKS: dict[str, Mask] = {mask.__name__: mask for mask in (magnitude, wanda, obs, columns, greedy, taylor, random)}
