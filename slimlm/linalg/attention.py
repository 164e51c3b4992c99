"""Softmax attention by matrix products, for CPUs: of one query, and of windows, each token of which sees those before.

heads: of a group, which have the group's keys and values.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimlm.linalg.differentiable import Context, applied

CACHED = 1 << 19  # keys of one query's at a time, in fp32: what stays in a cache
QUERIES = 64  # of a window at a time: they need no scores of what comes behind them
SCORES = 1 << 22  # at a time

Queries = Annotated[Tensor, "batch groups heads time size"]
Keys = Annotated[Tensor, "batch groups time size"]


def one_query(
    query: Annotated[Tensor, "batch groups heads size"],
    key: Keys,
    value: Annotated[Tensor, "batch groups time out"],
    mask: Annotated[Tensor, "masks 1 1 time"] | Annotated[Tensor, "masks 1 1 time", bool] | None,
    scale: float,
) -> Annotated[Tensor, "batch groups heads out"]:
    """What one query for each of the batch gets. mask: of keys to see, True, or what is added to scores.

    In fp32: oneDNN, which has bf16's products, would keep code for every length there is."""
    rows = max(1, CACHED // key[0].numel())
    masks = [None] * len(query) if mask is None else mask.expand(len(query), -1, -1, -1).split(rows)
    parts = zip((query.float() * scale).split(rows), key.split(rows), value.split(rows), masks, strict=False)
    return torch.cat([_attended(*part) for part in parts])


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Of some of the batch."""
    scores = query @ key.float().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value.float()).to(value.dtype)


def causal(
    query: Queries, key: Keys, value: Annotated[Tensor, "batch groups time out"], scale: float
) -> Annotated[Tensor, "batch groups heads time out"]:
    """What every token of windows gets of those up to it, with a gradient, for which scores are computed again.

    Scores and softmax are fp32, products otherwise in the dtype of what is given. Lengths are to be few and short:
    oneDNN keeps code for each, in bf16."""
    rows = max(1, SCORES // (query[0, ..., 0].numel() * QUERIES))
    parts = zip(query.split(rows), key.split(rows), value.split(rows), strict=True)
    found = [applied(_Causal, *part, torch.tensor(scale, dtype=torch.float32)) for part in parts]
    return torch.cat(found) if len(found) > 1 else found[0]


class _Causal(torch.autograd.Function):
    """A few queries of every head of a group are the rows of one product, as much of their scores in memory as that
    (Dao et al., arXiv 2205.14135, algorithms 1 and 4, with whole rows)."""

    @staticmethod
    def forward(ctx: Context, query: Tensor, key: Tensor, value: Tensor, scale: Tensor) -> Tensor:
        """As `causal`."""
        batch, groups, heads, time, _ = query.shape  # out lies in memory as what reads it wants it
        out = query.new_empty(batch, time, groups, heads, value.shape[-1]).permute(0, 2, 3, 1, 4)
        with _as_given(query):
            for rows, weights in _weights(query, key, scale):
                _rows(out, rows).copy_((weights @ value[:, :, : rows.stop]).unflatten(2, (heads, -1)))
        ctx.save_for_backward(query, key, value, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Of all but the scale."""
        query, key, value, scale = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), _sum_like(key), _sum_like(value)
        with _as_given(query):
            for rows, weights in _weights(query, key, scale):
                seen, slopes = slice(rows.stop), _rows(slope, rows).flatten(2, 3)
                of_value[:, :, seen] += weights.transpose(-1, -2) @ slopes
                of_weights = slopes @ value[:, :, seen].transpose(-1, -2)
                # In fp32 inside: nearly all of it cancels where one token has all the weight.
                of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                _rows(of_query, rows).copy_((of_scores @ key[:, :, seen]).unflatten(2, (query.shape[2], -1)))
                of_key[:, :, seen] += of_scores.transpose(-1, -2) @ _rows(query, rows).flatten(2, 3)
        return of_query.mul_(scale), of_key.mul_(scale).to(key.dtype), of_value.to(value.dtype), None


def _as_given(like: Tensor) -> torch.autocast:
    """Inside, products are in the dtype of their factors."""
    return torch.autocast(like.device.type, enabled=False)


def _sum_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.float32)


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[..., rows, :]


def _weights(query: Tensor, key: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """For a few queries after others, which they are and what they take of every token up to the last of them:
    [batch, groups, heads * some, seen]."""
    time, key = query.shape[-2], key.float().transpose(-1, -2)
    behind = torch.full((QUERIES, QUERIES), -torch.inf, dtype=torch.float32, device=query.device).triu(1)
    for start in range(0, time, QUERIES):
        rows = slice(start, min(start + QUERIES, time))
        own = rows.stop - start
        scores = (_rows(query, rows).flatten(2, 3).float() * scale) @ key[..., : rows.stop]
        scores.view(*query.shape[:3], own, rows.stop)[..., start:] += behind[:own, :own]
        yield rows, scores.softmax(-1).to(query.dtype)
