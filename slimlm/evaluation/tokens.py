"""What a model, alone or beside the dense one, makes of every token of test windows."""

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.deal import Deal
from slimlm.errors import RunFailure
from slimlm.linalg.likelihood import token_figures
from slimlm.model.ends import logits
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel
from slimlm.ranks import ALONE, Ranks

FIGURES = ("nll", "dense_nll", "kl", "same_top")  # in this order; of a model alone the first
Figures = Annotated[Tensor, "windows figures time"]  # fp32, on the CPU, of every token but each window's first


@torch.no_grad()
def measure_tokens(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    windows: Tensor,
    batch_size: int,
    advance: Callable[[int], None] = lambda done: None,
    ranks: Ranks = ALONE,
) -> Figures:
    """Figures of windows: [n, time] under transformers causal LMs, of which each rank has its own and takes some
    batches; for all, the same numbers as of one. Raises RunFailure when one is not finite."""
    batches = windows.split(batch_size)
    own = []
    for batch in Deal(ranks, len(batches)).pick(batches):
        got, *wanted = (_logits(one, batch) for one in (model, dense) if one is not None)
        targets = batch[:, 1:].to(got.device)
        own.append(_finite(token_figures(got, targets, *(one.to(got.device) for one in wanted))).cpu())
        advance(len(batch))
    ranks.note("windows", sum(map(len, own)))
    return _joined(own, 1 if dense is None else len(FIGURES), windows, ranks)


def _logits(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Of all tokens but the last: [batch, time - 1, vocab]."""
    found: Tensor = model(input_ids=batch.to(model.device), use_cache=False).logits
    return found[:, :-1]


@torch.no_grad()
def streamed_figures(models: list[tuple[StreamedModel, Stream]], windows: Tensor, ranks: Ranks) -> Figures:
    """The same of one or two models' streams that went through all blocks. windows: [n, time], of all ranks."""
    own = [tokens.new_zeros(len(tokens), 0, 0, dtype=torch.float32, device="cpu") for tokens in models[0][1].tokens]
    for pieces in zip(*(logits(*one) for one in models), strict=True):
        number, positions, got = pieces[0]
        targets = models[0][1].tokens[number][:, 1:][:, positions]
        heads = [found[:, : targets.shape[1]] for _, _, found in pieces]
        if targets.shape[1]:
            part = _finite(token_figures(heads[0], targets, *heads[1:])).cpu()
            own[number] = torch.cat([own[number], part], dim=2) if own[number].numel() else part
        del pieces, heads, got  # before the next are computed
    ranks.note("windows", sum(map(len, own)))
    return _joined(own, len(models) if len(models) == 1 else len(FIGURES), windows, ranks)


def _finite(figures: Tensor) -> Tensor:
    """Raises RunFailure when a log-likelihood is not."""
    if not torch.isfinite(figures[:, :2]).all():
        raise RunFailure("the model's log-likelihood is NaN or Inf: its weights or dtype are broken")
    return figures


def _joined(own: list[Tensor], count: int, windows: Tensor, ranks: Ranks) -> Figures:
    """All ranks' figures, `count` of each token, of windows: [n, time]."""
    none = torch.zeros(0, count, windows.shape[1] - 1)
    return ranks.joined(torch.cat([none, *own])).cpu()
