"""Which weights to prune: exactly as many as asked for, ties broken by position."""

from typing import Annotated

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
Tile = tuple[int, int]  # rows and columns


def smallest(scores: Annotated[Tensor, "*shape"], count: int) -> Annotated[Tensor, "*shape", bool]:
    """Mask of the `count` smallest of all scores; among equal ones the first go.

    Raises ValueError for a count below 0 or above the number of scores.
    """
    flat = scores.reshape(-1)
    if not 0 <= count <= flat.numel():
        raise ValueError(f"cannot prune {count} of {flat.numel()} weights")
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # On a GPU kthvalue works on each row of a tensor with one block of threads, and there is one row.
    threshold = flat.sort().values[count - 1] if flat.is_cuda else flat.kthvalue(count).values
    pruned = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    pruned[ties[: count - int(pruned.sum())]] = True
    return pruned.view(scores.shape)


def smallest_per_row(
    scores: Annotated[Tensor, "rows n"], counts: Annotated[Tensor, "rows", int]
) -> Annotated[Tensor, "rows n", bool]:
    """Mask of the `counts[r]` smallest scores in each row r; among equal ones the first go."""
    pruned = torch.zeros_like(scores, dtype=torch.bool)
    rows = max(1, CHUNK_ELEMENTS // max(1, scores.shape[1]))
    position, counts = torch.arange(scores.shape[1], device=scores.device), counts.to(scores.device)
    for part, count, mask in zip(scores.split(rows), counts.split(rows), pruned.split(rows), strict=True):
        order = part.argsort(dim=1, stable=True)
        mask.scatter_(1, order, (position < count[:, None]).expand_as(order))
    return pruned


def spread(total: int, rows: int) -> Annotated[Tensor, "{rows}", int]:
    """`total` weights over rows as evenly as whole numbers allow; the first rows have the odd ones."""
    counts = torch.full((rows,), total // rows)
    counts[: total % rows] += 1
    return counts


def smallest_per_group(scores: Annotated[Tensor, "rows n"], keep: int, group: int) -> Annotated[Tensor, "rows n", bool]:
    """Mask of all but the `keep` largest in every group of `group` consecutive columns.

    As 2:4 kernels take it (Mishra et al., arXiv 2104.08378). Raises ValueError when the groups do not tile the columns.
    """
    if scores.shape[1] % group:
        raise ValueError(f"{scores.shape[1]} columns are not whole groups of {group}")
    grouped = scores.reshape(-1, group)
    return smallest_per_row(grouped, torch.full((grouped.shape[0],), group - keep)).view(scores.shape)


def pooled(scores: Annotated[Tensor, "out in"], tile: Tile) -> Annotated[Tensor, "rows columns"]:
    """Sums over tiles of so many rows and columns: [out, in] -> [out / rows, in / columns].

    Raises ValueError when they do not tile it.
    """
    if tile == (1, 1):
        return scores
    rows, columns = tile
    if scores.shape[0] % rows or scores.shape[1] % columns:
        raise ValueError(f"{tuple(scores.shape)} is not whole tiles of {rows}x{columns}")
    across: Tensor = scores.unflatten(1, (-1, columns)).sum(2)
    return across.view(-1, rows, across.shape[1]).sum(1)


def spread_out(tiles: Annotated[Tensor, "rows columns", bool], tile: Tile) -> Annotated[Tensor, "out in", bool]:
    """What is said of tiles, said of all that is in them: [out / rows, in / columns] -> [out, in]."""
    return tiles if tile == (1, 1) else tiles.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
