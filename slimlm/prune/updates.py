"""What the weights that stay do about those that go: updates by name, all with the same leading arguments.

weight: [out, in]; chosen: what the mask left of it, and what is pruned, as in `masks.py`, and so is what they give.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor

from slimlm.linalg import obs
from slimlm.linalg.hessian import Hessian
from slimlm.prune.curvature import Curvature
from slimlm.prune.masks import Chosen
from slimlm.prune.quota import Quota

CHUNK_ELEMENTS = 1 << 24  # of a weight whose rows are solved for at once


def none(weight: Tensor, curvature: Curvature, quota: Quota, chosen: Chosen, swaps: int) -> Chosen:
    """Nothing but zeros in weight: [out, in]."""
    return weight.masked_fill(chosen[1], 0), chosen[1]


def left_to_right(weight: Tensor, curvature: Hessian, quota: Quota, chosen: Chosen, swaps: int) -> Chosen:
    """Columns of weight: [out, in], to the right make up for those that went (SparseGPT, arXiv 2301.00774, algorithm
    1); done already where the mask was chosen on the way."""
    found, pruned = chosen
    if found is weight:
        found, _ = obs.left_to_right(weight, curvature, lambda scores, at: pruned[:, at : at + scores.shape[1]])
    return found, pruned


def summed(weight: Tensor, curvature: obs.Inverse, quota: Quota, chosen: Chosen, swaps: int) -> Chosen:
    """The sum of the steps, [out, in], that each pruned weight alone would have them take (M-FAC, arXiv 2107.03356,
    section 3)."""
    return obs.summed(weight, curvature, chosen[1]), chosen[1]


def joint(weight: Tensor, curvature: Hessian, quota: Quota, chosen: Chosen, swaps: int) -> Chosen:
    """The exact minimiser [out, in] on the mask, which is refined by so many swaps before; some rows at a time.

    In fp32, from factors of the curvature that may be in fp64: what rounding it costs is far below what a mask does.
    """
    step = max(1, CHUNK_ELEMENTS // (weight.shape[1] * quota.tile[0])) * quota.tile[0]
    dtype, weight, curvature, start = weight.dtype, weight.float(), curvature.to(torch.float32), chosen[0].float()
    solved = []
    for at in range(0, len(weight), step):
        rows = slice(at, at + step)
        own, pruned = curvature.rows(rows), chosen[1][rows]
        found = obs.joint(weight[rows], own, pruned, start[rows], obs.ROUGHLY)
        found, pruned = swapped(weight[rows], own, (found, pruned), quota, swaps)
        solved.append((obs.joint(weight[rows], own, pruned, found.found, obs.TOLERANCE).found, pruned))
    return torch.cat([found for found, _ in solved]).to(dtype), torch.cat([pruned for _, pruned in solved])


def swapped(
    weight: Annotated[Tensor, "out in"],
    curvature: Hessian,
    solved: tuple[obs.Solved, Annotated[Tensor, "out in", bool]],
    quota: Quota,
    rounds: int,
) -> tuple[obs.Solved, Annotated[Tensor, "out in", bool]]:
    """What is jointly solved on a mask, used up, and that mask, refined by so many rounds of `obs.swapped`.

    Rows that are no better for a round would not be for the next, and are done.
    """
    found, pruned = solved[0], solved[1].clone()
    place = torch.arange(len(weight), device=weight.device)
    for _ in range(rounds):
        some = weight[place], curvature.rows(place), pruned[place], found.those(place)
        other, mask, better = obs.swapped(*some, quota.group, quota.tile)
        place = place[better]
        found.put(place, other.those(better))
        pruned[place] = mask[better]
    return found, pruned


Update = Callable[[Tensor, Any, Quota, Chosen, int], Chosen]
UPDATES: dict[str, Update] = {
    update.__name__.replace("_", "-"): update for update in (none, left_to_right, summed, joint)
}
