"""What a student is to be like: a model beside it, or what that one said once."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from slimlm.deal import Deal
from slimlm.device import products_in
from slimlm.linalg.likelihood import Likeliest
from slimlm.progress import Progress
from slimlm.ranks import Ranks
from slimlm.recover.text import Numbers, Tokens

LOGITS = 1 << 28  # bytes of fp32 logits at once


class Said(NamedTuple):
    """predictions: logits [windows, time, vocabulary], or what is kept of them. states: what enters each block, and
    what leaves the last, [windows, time, hidden] each; none where nobody asked."""

    predictions: Tensor | Likeliest
    states: Sequence[Tensor] = ()


class Teacher(Protocol):
    """It says of windows, which it knows by their numbers or their tokens, what comes next."""

    def __call__(self, numbers: Numbers, tokens: Tokens, with_states: bool = False) -> Said:
        """Of a few windows."""


class Beside:
    """A model in memory that is asked every time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, numbers: Numbers, tokens: Tokens, with_states: bool = False) -> Said:
        """As any teacher."""
        found = self.model(input_ids=tokens, use_cache=False, output_hidden_states=with_states)
        return Said(found.logits, found.hidden_states or ())


class Remembered:
    """What a model said is likeliest to come, of all windows: Likeliest of [windows, time, k]. Its states are not."""

    def __init__(self, likeliest: Likeliest) -> None:
        self.likeliest = likeliest

    def __call__(self, numbers: Numbers, tokens: Tokens, with_states: bool = False) -> Said:
        """As any teacher."""
        return Said(self.likeliest.at(numbers, tokens.device))


def at_once(config: PretrainedConfig, time: int) -> int:
    """How many windows of so many tokens go through a model at a time, for the sake of its logits."""
    return max(1, LOGITS // int(4 * time * config.vocab_size))


@torch.no_grad()
def likeliest_of(
    model: PreTrainedModel, tokens: Tokens, count: int, dtype: torch.dtype, ranks: Ranks, progress: Progress
) -> Likeliest:
    """The `count` likeliest tokens behind every one of [windows, time], as a model that computes in a dtype has them,
    whose windows are dealt out to the ranks."""
    device, time = model.device, tokens.shape[1]
    place = device if ranks.size > 1 else "cpu"  # where other ranks get them from
    found = [Likeliest.of(torch.empty(0, time, model.config.vocab_size, device=place), count)]
    mine = Deal(ranks, len(tokens)).mine
    for batch in tokens[mine.start : mine.stop].split(at_once(model.config, time)):
        with products_in(device, dtype):
            logits = model(input_ids=batch.to(device, torch.int64), use_cache=False).logits
        found.append(Likeliest(*(one.to(place) for one in Likeliest.of(logits, count))))
        progress.step(len(batch))
    return Likeliest(*(ranks.joined(torch.cat(parts)).cpu() for parts in zip(*found, strict=True)))
