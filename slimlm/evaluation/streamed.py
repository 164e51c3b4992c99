"""Two models side by side, a block of each in memory at a time: what compression did, block by block and at the end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimlm.activations import HiddenStates, InMemory
from slimlm.errors import UserError
from slimlm.evaluation.perplexity import LogLikelihood, window_nll
from slimlm.progress import Progress
from slimlm.walk import Stream, StreamedModel


@dataclass
class Comparison:
    """Log-likelihoods of the same windows, and per block the mean relative error of the compressed stream."""

    dense: LogLikelihood
    compressed: LogLikelihood
    block_errors: list[float] = field(default_factory=list)


@torch.no_grad()
def compare_streamed(
    dense: StreamedModel,
    compressed: StreamedModel,
    batches: Sequence[Tensor],
    basis: Tensor | None,
    progress: Progress,
    hidden: Sequence[HiddenStates] | None = None,
) -> Comparison:
    """Run both models over batches of tokens [batch, time].

    basis: [hidden, width] says where the compressed stream lives in the dense one's space (None: the same space).
    hidden: where the two streams wait between blocks; in memory by default.
    """
    if len(dense.blocks) != len(compressed.blocks):
        raise UserError(
            f"models of {len(dense.blocks)} and {len(compressed.blocks)} blocks cannot be compared by block"
        )
    progress.stage("measuring", len(dense.blocks))
    places = hidden or (InMemory(), InMemory())
    streams = dense.embed(batches, places[0]), compressed.embed(batches, places[1])
    comparison = Comparison(LogLikelihood(dense.dtype), LogLikelihood(compressed.dtype))
    for index in range(len(dense.blocks)):
        start = time.perf_counter()
        for model, stream in zip((dense, compressed), streams, strict=True):
            with model.block(index):
                model.advance(index, stream)
        error = relative_error(*streams, basis)
        comparison.block_errors.append(error)
        progress.step()
        progress.done("measured", dense.family.block(index), time.perf_counter() - start, relative_error=error)
    for model, stream, likelihood in zip(
        (dense, compressed), streams, (comparison.dense, comparison.compressed), strict=True
    ):
        add_likelihood(model, stream, likelihood)
    return comparison


def add_likelihood(model: StreamedModel, stream: Stream, likelihood: LogLikelihood) -> None:
    """Add what the model makes of a stream that went through all its blocks."""
    nll = [torch.zeros(tokens.shape[0], dtype=torch.float64, device=model.device) for tokens in stream.tokens]
    for number, positions, logits in model.logits(stream):
        targets = stream.tokens[number][:, 1:][:, positions]
        if targets.shape[1]:
            nll[number] += window_nll(logits[:, : targets.shape[1]], targets)
        del logits  # before the next are computed
    for sums, tokens in zip(nll, stream.tokens, strict=True):
        likelihood.count(sums, tokens.shape[1] - 1)


def relative_error(dense: Stream, compressed: Stream, basis: Tensor | None) -> float:
    """Mean over tokens of `||x - S x'|| / ||x||`, with S the basis: 0 is no error, 1 as much error as signal."""
    total, tokens = 0.0, 0
    for x, y in zip(dense.hidden, compressed.hidden, strict=True):
        restored = y.float() if basis is None else y.float() @ basis.T.float()
        error = (x.float() - restored).norm(dim=-1) / x.float().norm(dim=-1).clamp_min(1e-30)
        total += float(error.sum())
        tokens += error.numel()
    return total / tokens
