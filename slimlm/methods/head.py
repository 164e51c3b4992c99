"""Refit of the head, the one layer whose error can be told in the loss itself.

The dense head keeps its rows; a map T: [hidden, width] from what the compressed model's head sees to what the dense one
saw is fitted, first by least squares, then to the Kullback-Leibler divergence from the dense model's predictions,
which is convex in T. Least squares would spend itself on logits of tokens nobody predicts.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slimlm.errors import RunFailure
from slimlm.linalg.ridge import Regression, ridge
from slimlm.linalg.softmax import RATE, MapFit
from slimlm.methods.refit import Pair
from slimlm.methods.rotation import head_map, sliced_final_norm
from slimlm.walk import StreamedModel
from slimlm.work import Work

STEP = "head fitted"
EPOCHS = 3
STEP_TOKENS = 2048


@torch.no_grad()
def refit_head(pair: Pair, seed: int, work: Work, rate: float = RATE) -> Tensor:
    """Fit the map for streams that went through all blocks: [hidden, width], what the dense head is to take for its
    input. rate: of its steps; less where less was lost.
    """
    dense, width = pair.dense, pair.basis.shape[1]
    head = dense.family.head
    prior = head_map(dense, pair.basis)
    work.progress.stage("refitting the head", EPOCHS + 3)
    with dense.loaded([dense.family.final_norm, *dense.head_parts]):
        module = dense.model.get_submodule(head)
        rows = module.get_parameter("weight").float()
        if dense.logit_divisor != 1:  # a copy of a large table
            rows = rows / dense.logit_divisor
        data = Regression.of(width, pair.basis.shape[0], pair.basis.device)
        for x, seen, held in _head_inputs(pair, range(len(pair.held))):
            data.add(seen, x, held)
        work.progress.step()
        gram = data.fit.xx.clone()
        least_squares = ridge(data, prior, rows.T @ rows).weight
        bias = module.bias.float() / dense.logit_divisor if getattr(module, "bias", None) is not None else None
        fit = MapFit(rows, bias, least_squares, gram, rate)
        before = _divergence(pair, fit)
        work.progress.step()
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(EPOCHS):
            for x, seen, done in _shuffled(pair, generator):
                fit.step(x, seen, (epoch + done) / EPOCHS)
            work.progress.step()
        after = _divergence(pair, fit)
        work.progress.step()
    if not math.isfinite(before + after):
        raise RunFailure(f"refitting {head} gave NaN or Inf: use --no-refit")
    better = after < before
    work.journal.commit(STEP, notes={"kl_least_squares": before, "kl": after if better else before})
    return fit.map if better else least_squares


def fits_head(model: StreamedModel) -> bool:
    """Whether the head may be changed, and logits are a linear function of what the final norm gives."""
    capped = getattr(model.config, "final_logit_softcapping", None) is not None
    return bool(model.family.final_norm) and not capped and model.family.head not in model.skipped


def head_notes(work: Work) -> dict[str, float]:
    """Divergences on held-out windows that a fit found, in this process or an earlier one."""
    record = work.journal.last(STEP)
    return record["notes"] if record else {}


def _head_inputs(pair: Pair, numbers: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per batch: what the dense head sees [batch, time, hidden], what the other does [..., width]; what is held out."""
    dense_norm = pair.dense.model.get_submodule(pair.dense.family.final_norm)
    small_norm, parameters = pair.small.family.final_norm, sliced_final_norm(pair.dense, pair.basis)
    for number in numbers:
        x, y = (pair.streams[label].hidden[number] for label in ("dense", "small"))
        before = dense_norm(x).float()  # first: the two models' norm may be one module
        with pair.small.placed(small_norm, parameters) as norm:
            yield before, norm(y).float(), pair.held[number]


def _divergence(pair: Pair, fit: MapFit) -> float:
    """Mean KL divergence on the held-out windows."""
    total, tokens = 0.0, 0
    for x, seen, held in _head_inputs(pair, range(len(pair.held))):
        for part, small in zip(
            x[held].flatten(0, 1).split(STEP_TOKENS), seen[held].flatten(0, 1).split(STEP_TOKENS), strict=True
        ):
            total += fit.divergence(part, small)
            tokens += len(part)
    return total / max(1, tokens)


def _shuffled(pair: Pair, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, float]]:
    """All tokens that are not held out, in steps of at most STEP_TOKENS; and the share that is then done."""
    count = len(pair.held)
    order = torch.randperm(count, generator=generator).tolist()
    for position, (x, seen, held) in enumerate(_head_inputs(pair, order)):
        x, seen = x[~held].flatten(0, 1), seen[~held].flatten(0, 1)
        mixed = torch.randperm(len(x), generator=generator).to(x.device)
        for chosen in mixed.split(STEP_TOKENS) if len(x) else ():  # a batch may be held out as a whole
            yield x[chosen], seen[chosen], (position + 1) / count
