"""Tokens drawn from a model's predictions, and the gradients of their losses.

PyTorch's multinomial draw makes a random number for every outcome, on one core; sums of probabilities, a few rows at a
time, take a tenth of its time.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from slimlm.linalg.likelihood import rows_at_once

CACHED = 1 << 19  # logits at a time, in fp32: with their sums, what stays in a CPU's cache
IGNORED = -100  # a target that is none


def draw(
    logits: Annotated[Tensor, "rows outcomes"], heat: Annotated[Tensor, "rows 1"], generator: torch.Generator
) -> Annotated[Tensor, "rows 1", int]:
    """One of each row's outcomes at its temperature: where a uniform number falls among the sums of probabilities."""
    places = _places(logits, generator)
    rows = rows_at_once(logits, CACHED)
    parts = zip(*(one.split(rows) for one in (logits, heat, places)), strict=True)
    return torch.cat([_drawn((part.float() / heat).softmax(-1), place) for part, heat, place in parts])


def slopes_of_drawn(
    logits: Annotated[Tensor, "*positions outcomes"], generator: torch.Generator
) -> Annotated[Tensor, "*positions outcomes"]:
    """Gradients of the negative log-likelihoods of outcomes drawn from the logits themselves."""
    return _slopes(logits, _places(logits, generator), _drawn)


def slopes_of(
    logits: Annotated[Tensor, "*positions outcomes"], targets: Annotated[Tensor, "*positions", int]
) -> Annotated[Tensor, "*positions outcomes"]:
    """Gradients of the targets' negative log-likelihoods; 0 where a target is IGNORED."""
    none = (targets == IGNORED)[..., None]
    found = _slopes(logits, targets.masked_fill(none[..., 0], 0).reshape(-1, 1), lambda chances, wanted: wanted)
    return found.masked_fill_(none, 0)


def _slopes(logits: Tensor, given: Tensor, outcome: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """softmax(logits) less 1 at the outcome that some rows' chances and what is given of each make, a few at a time."""
    found = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = rows_at_once(logits, CACHED)
    parts = zip(*(one.flatten(0, -2).split(rows) for one in (logits, given, found)), strict=True)
    for part, own, place in parts:
        chances = part.float().softmax(-1)
        at = outcome(chances, own)
        place.copy_(chances.scatter_add_(-1, at, chances.new_full(at.shape, -1.0)))
    return found


def _drawn(chances: Tensor, places: Tensor) -> Tensor:
    sums = chances.cumsum(-1)
    return (sums <= sums[:, -1:] * places).sum(-1, keepdim=True).clamp_max(sums.shape[-1] - 1)


def _places(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A uniform number for each row: [rows, 1]."""
    return torch.rand(logits[..., 0].numel(), 1, dtype=torch.float32, generator=generator, device=logits.device)
