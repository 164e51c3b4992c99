"""Which weights to prune: exactly as many as asked for, ties broken by position."""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22


def smallest(scores: Tensor, count: int) -> Tensor:
    """Boolean mask, in the shape of `scores`, of the `count` smallest; among equal ones the first go.

    Raises ValueError for a count below 0 or above the number of scores.
    """
    flat = scores.reshape(-1)
    if not 0 <= count <= flat.numel():
        raise ValueError(f"cannot prune {count} of {flat.numel()} weights")
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    pruned = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    pruned[ties[: count - int(pruned.sum())]] = True
    return pruned.view(scores.shape)


def smallest_per_row(scores: Tensor, counts: Tensor) -> Tensor:
    """Boolean mask of the `counts[r]` smallest in each row r of scores: [rows, n]; among equal ones the first go."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    rows = max(1, CHUNK_ELEMENTS // max(1, scores.shape[1]))
    position, counts = torch.arange(scores.shape[1], device=scores.device), counts.to(scores.device)
    for part, count, mask in zip(scores.split(rows), counts.split(rows), pruned.split(rows), strict=True):
        order = part.argsort(dim=1, stable=True)
        mask.scatter_(1, order, (position < count[:, None]).expand_as(order))
    return pruned


def spread(total: int, rows: int) -> Tensor:
    """`total` weights over rows as evenly as whole numbers allow; the first rows have the odd ones: int64 [rows]."""
    counts = torch.full((rows,), total // rows)
    counts[: total % rows] += 1
    return counts


def smallest_per_group(scores: Tensor, keep: int, group: int) -> Tensor:
    """Mask of all but the `keep` largest in every group of `group` consecutive columns of scores: [rows, n] (N:M).

    Raises ValueError when the groups do not tile the columns.
    """
    if scores.shape[1] % group:
        raise ValueError(f"{scores.shape[1]} columns are not whole groups of {group}")
    grouped = scores.reshape(-1, group)
    return smallest_per_row(grouped, torch.full((grouped.shape[0],), group - keep)).view(scores.shape)
