"""Refit of the head, the one layer whose error can be told in the loss itself.

The dense head keeps its rows; a map T: [hidden, width] from what the compressed model's head sees to what the dense one
saw is fitted, first by least squares, then to the Kullback-Leibler divergence from the dense model's predictions,
which is convex in T. Least squares would spend itself on logits of tokens nobody predicts.
"""

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slimlm.deal import LANES, Deal, Parts, Sum
from slimlm.errors import RunFailure
from slimlm.fit.pair import AddOf, Pair
from slimlm.fit.ridge import ridge
from slimlm.linalg.softmax import RATE, MapFit
from slimlm.model.result import Result
from slimlm.model.rotation import head_map, sliced_final_norm, write_head
from slimlm.model.streamed import StreamedModel
from slimlm.progress import Progress
from slimlm.ranks import Ranks

STEP, STAGE = "head fitted", "refitting the head"
EPOCHS = 3
STEP_TOKENS = 2048


def write_fitted_head(
    pair: Pair, result: Result, seed: int, progress: Progress, rate: float = RATE
) -> dict[str, float]:
    """Write final norm and head, fitted, unless an earlier process did; divergences on held-out windows."""
    head = pair.dense.family.head
    if not result.written(head):
        seen, divergences = fit_head(pair, seed, progress, rate)
        result.journal.commit(STEP, notes=divergences)
        result.write(pair.dense, head, write_head(pair.dense, seen, pair.basis))
    record = result.journal.last(STEP)
    return record["notes"] if record else {}


@torch.no_grad()
def fit_head(pair: Pair, seed: int, progress: Progress, rate: float = RATE) -> tuple[Tensor, dict[str, float]]:
    """Fit the map for streams that went through all blocks: [hidden, width], what the dense head is to take for its
    input; and divergences on held-out windows. rate: of its steps; less where less was lost. Raises RunFailure on NaN.
    """
    dense, width, ranks = pair.dense, pair.basis.shape[1], pair.deal.ranks
    prior = head_map(dense, pair.basis)
    progress.stage(STAGE, EPOCHS + 3)
    start = time.perf_counter()
    with dense.loaded([dense.family.final_norm, *dense.head_parts]):
        rows, bias = _logit_rows(dense)

        def show(add_of: AddOf) -> None:
            for number, (x, seen, held) in enumerate(_head_inputs(pair, range(len(pair.held)))):
                add_of(number)(seen, x, held, None)

        data = pair.regression(width, pair.basis.shape[0], show)
        progress.step()
        gram = ranks.once(data.fit.xx.clone() if ranks.first else None)
        least_squares = ridge(data, prior, rows.T @ rows, ranks=ranks).weight
        fit = MapFit(rows, bias, least_squares, gram, rate)
        ranks.share([fit.whiten, fit.point])  # eigenvectors of other processors might have other signs
        before = _divergence(pair, fit)
        progress.step()
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(EPOCHS):
            for x, seen, done in _shuffled(pair, generator):
                fit.step(_gradient(ranks, fit, x, seen), len(x), (epoch + done) / EPOCHS)
            progress.step()
        after = _divergence(pair, fit)
        progress.step()
    progress.done(STAGE, dense.family.head, time.perf_counter() - start)
    if not math.isfinite(before + after):
        raise RunFailure(f"refitting {dense.family.head} gave NaN or Inf: use --no-refit")
    notes = {"kl_least_squares": before, "kl": min(after, before)}
    return fit.map if after < before else least_squares, notes


def _logit_rows(dense: StreamedModel) -> tuple[Tensor, Tensor | None]:
    """The head's weight [vocab, hidden] and bias [vocab], loaded, such that they give logits: fp32."""
    module, divisor = dense.model.get_submodule(dense.family.head), dense.logit_divisor
    rows = module.get_parameter("weight").float()
    if divisor != 1:  # a copy of a large table
        rows = rows / divisor
    bias = getattr(module, "bias", None)
    return rows, None if bias is None else bias.float() / divisor


def fits_head(model: StreamedModel) -> bool:
    """Whether the head may be changed, and logits are a linear function of what the final norm gives."""
    capped = getattr(model.config, "final_logit_softcapping", None) is not None
    return bool(model.family.final_norm) and not capped and model.family.head not in model.skipped


def _head_inputs(pair: Pair, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
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
    own: list[tuple[float, int]] = []
    for x, seen, held in _head_inputs(pair, range(len(pair.held))):
        for part, small in zip(
            x[held].flatten(0, 1).split(STEP_TOKENS), seen[held].flatten(0, 1).split(STEP_TOKENS), strict=True
        ):
            own.append((fit.divergence(part, small), len(part)))
    return pair.deal.ranks.mean(own)


def _shuffled(pair: Pair, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, float]]:
    """All tokens that are not held out, in steps of at most STEP_TOKENS, on every rank; and the share that is then
    done."""
    count = pair.deal.count
    for position, index in enumerate(torch.randperm(count, generator=generator).tolist()):
        x, seen = _learned(pair, index)
        mixed = torch.randperm(len(x), generator=generator).to(x.device)
        for chosen in mixed.split(STEP_TOKENS) if len(x) else ():  # a batch may be held out as a whole
            yield x[chosen], seen[chosen], (position + 1) / count


def _learned(pair: Pair, index: int) -> tuple[Tensor, Tensor]:
    """What both heads see of a batch of all, [tokens, hidden] and [tokens, width], but for what is held out."""
    deal, owner = pair.deal, pair.deal.owner(index)
    x = seen = None
    if index in deal.mine:
        ((dense, small, held),) = _head_inputs(pair, [index - deal.mine.start])
        x, seen = dense[~held].flatten(0, 1), small[~held].flatten(0, 1)
    return deal.ranks.once(x, owner), deal.ranks.once(seen, owner)


def _gradient(ranks: Ranks, fit: MapFit, x: Tensor, seen: Tensor) -> Tensor:
    """Of the loss of a step's tokens, [tokens, hidden] and [tokens, width], of which each rank takes its share."""
    deal = Deal(ranks, LANES)
    parts = Parts(deal, lambda: Sum([fit.point]))
    shares = zip(deal.pick(x.tensor_split(LANES)), deal.pick(seen.tensor_split(LANES)), strict=True)
    for number, (own, its) in enumerate(shares):
        part = parts.at(number)
        fit.add_gradient(part.tensors()[0], own, its)
    found = parts.shared()
    assert found is not None
    return found.tensors()[0]
