"""Two models side by side, a block of each in memory at a time: what compression did, block by block and at the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimlm.errors import UserError
from slimlm.evaluation.perplexity import LogLikelihood
from slimlm.model.ends import embed, nll
from slimlm.model.hidden import HiddenStates
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import walk
from slimlm.progress import Progress
from slimlm.ranks import ALONE, Ranks


@dataclass
class Comparison:
    """Log-likelihoods of the same windows, and per block the mean relative error of the compressed stream."""

    dense: LogLikelihood
    compressed: LogLikelihood
    block_errors: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Kinship:
    """What of the dense model a compressed one's stream is.

    basis: [hidden, width], where the stream lives in the dense one's space (None: it is the same space), or that after
    each block, by number. blocks: the dense model's blocks, by number, that there still are (None: all). is_known:
    whether basis is known, so that the streams can be compared block by block.
    """

    basis: Tensor | Callable[[int], Tensor] | None = None
    blocks: Sequence[int] | None = None
    is_known: bool = True

    def error(self, dense: Stream, compressed: Stream, index: int, centred: bool) -> float:
        """The relative error after a block, by number."""
        basis = self.basis(index) if callable(self.basis) else self.basis
        return relative_error(dense, compressed, basis, centred)


SAME = Kinship()


@torch.no_grad()
def compare_streamed(
    models: tuple[StreamedModel, StreamedModel],
    batches: Sequence[Tensor],
    progress: Progress,
    kinship: Kinship = SAME,
    hidden: Sequence[HiddenStates] | None = None,
    ranks: Ranks = ALONE,
) -> Comparison:
    """Run the dense and the compressed model over batches of tokens [batch, time], dealt out to the ranks.

    hidden: where the two streams wait between blocks; in memory by default. Raises UserError where the compressed model
    does not have as many blocks as `kinship` says.
    """
    dense, compressed = models
    kept = list(range(len(dense.blocks)) if kinship.blocks is None else kinship.blocks)
    if len(kept) != len(compressed.blocks):
        raise UserError(
            f"models of {len(dense.blocks)} and {len(compressed.blocks)} blocks cannot be compared by block"
        )
    places = hidden or (None, None)
    streams = embed(dense, batches, places[0], ranks), embed(compressed, batches, places[1], ranks)
    length = batches[0].shape[1]
    errors: list[float] = []
    becomes = dict(zip(kept, compressed.blocks, strict=True))
    for block in walk(dense, progress, "measuring"):
        block.advance(streams[0])
        block.unload()
        if block.index in becomes:
            with becomes[block.index].loaded() as other:
                other.advance(streams[1])
        if kinship.is_known:
            errors.append(kinship.error(*streams, block.index, dense.family.centred))
            block.facts = {"relative_error": errors[-1]}
    return Comparison(_likelihood(dense, streams[0], length), _likelihood(compressed, streams[1], length), errors)


def _likelihood(model: StreamedModel, stream: Stream, length: int) -> LogLikelihood:
    likelihood = LogLikelihood(model.dtype)
    (sums,) = nll(model, [stream])
    likelihood.count(sums, length - 1)
    return likelihood


def relative_error(dense: Stream, compressed: Stream, basis: Tensor | None, centred: bool = False) -> float:
    """Mean over tokens of `||x - S x'|| / ||x||`, with S the basis: 0 is no error, 1 as much error as signal.

    basis: [hidden, width]. centred: where the norms subtract the mean of x, it does not count.
    """
    sums: list[tuple[float, int]] = []
    for x, y in zip(dense.hidden, compressed.hidden, strict=True):
        restored = y.float() if basis is None else y.float() @ basis.T.float()
        x = x.float()
        if centred:
            x, restored = x - x.mean(-1, keepdim=True), restored - restored.mean(-1, keepdim=True)
        error = (x - restored).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-30)
        sums.append((float(error.sum()), error.numel()))
    return dense.deal.ranks.mean(sums)
