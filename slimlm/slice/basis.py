"""The basis of the residual stream: an orthonormal [hidden, hidden], most important directions first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimlm.deal import Parts
from slimlm.linalg.gram import Gram, is_wide, rms_normalise
from slimlm.linalg.pca import felt, leading, principal_basis, with_kept, without_mean
from slimlm.model.block import Block
from slimlm.model.linears import watched
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import Streams

MASSIVE = 20.0  # a token this many times the median root mean square of its batch is a massive activation
MOST_MASSIVE = 16  # directions at most
MASSIVE_ENERGY = 1e-3  # share of the massive tokens' energy from which on a direction is one of theirs


@dataclass(frozen=True)
class Basis:
    """vectors: [hidden, hidden] fp64. influence: [blocks], 1 - cosine between what enters and leaves each block.

    centred: whether the norms subtract the mean; the all-ones direction is then the last.
    """

    vectors: Tensor
    influence: Tensor
    notes: dict[str, Any]
    centred: bool = False

    def of(self, width: int) -> Tensor:
        """For a stream of this width: [hidden, width]."""
        return leading(self.vectors, width, self.centred)


class StreamStatistics:
    """Sums that say what there is to know of a model's residual stream.

    gram: of the RMS-normalised stream over all norms, [hidden, hidden] fp64. massive: the same of massive activations
    only. turned: [blocks], summed 1 - cosine between a block's input and output.
    """

    def __init__(self, model: StreamedModel) -> None:
        hidden = model.config.hidden_size
        self.gram, self.massive = (Gram(hidden, model.device, torch.float64) for _ in range(2))
        self.turned = torch.zeros(len(model.blocks), dtype=torch.float64)
        self._normalise = partial(rms_normalise, eps=model.norm_eps, centred=model.family.centred)

    def tensors(self) -> list[Tensor]:
        """Grams [hidden, hidden] and their tokens [1], turned [blocks]."""
        return [*self.gram.tensors(), *self.massive.tensors(), self.turned]

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Hold these instead: Grams [hidden, hidden] and their tokens [1], turned [blocks]."""
        device = self.gram.matrix.device
        gram, tokens, massive, of_massive, turned = tensors
        self.gram.replace([gram.to(device), tokens])
        self.massive.replace([massive.to(device), of_massive])
        self.turned = turned.cpu()

    def turn(self, index: int, before: Tensor, after: Tensor) -> None:
        """Add what block `index` does to a batch [batch, time, hidden]."""
        self.turned[index] += float((1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)).sum())

    def add(self, x: Tensor) -> None:
        """Add what a norm reads: [batch, time, hidden]."""
        x = x.flatten(0, -2)
        normalised = self._normalise(x)
        self.gram.add(normalised)
        size = x.float().square().mean(-1).sqrt()
        massive = size > MASSIVE * size.median()
        if massive.any():
            self.massive.add(normalised[massive])


def collected(model: StreamedModel, walk: Iterable[Block], streams: Streams, norms: bool) -> StreamStatistics:
    """Of the stream "dense", which moves through the blocks of a walk, its `state` being kept up. For all ranks.

    norms: whether what enters the blocks' norms is looked at, or only what leaves the last block.
    """
    stream, wide = streams["dense"], is_wide(model.config.hidden_size)
    parts = Parts(stream.deal, partial(StreamStatistics, model), whole=wide, again=True)
    for key in sorted(streams.state):
        lane, _, place = key.partition(".")
        if int(lane) not in parts.parts:
            parts.parts[int(lane)] = parts.make()
        found = parts.parts[int(lane)]
        found.replace([*found.tensors()[: int(place)], streams.state[key], *found.tensors()[int(place) + 1 :]])

    def observe(_: str, x: Tensor, output: Tensor) -> None:
        parts.at(stream.number).add(x)

    for block in walk:

        def turn(before: Tensor, after: Tensor, index: int = block.index) -> None:
            parts.at(stream.number).turn(index, before, after)

        names = [norm.name for norm in block.family.norms if norms]
        with watched(block.module, names, observe):
            block.advance(stream, turn)
        lanes = {lane: part.tensors() for lane, part in parts.parts.items()}
        streams.state = {f"{lane}.{place}": t for lane, tensors in lanes.items() for place, t in enumerate(tensors)}
    for number, hidden in stream.batches():
        parts.at(number).add(hidden)
    return parts.shared() or parts.make()


def basis_from(model: StreamedModel, found: StreamStatistics, gradients: Tensor | None) -> Basis:
    """Eigenvectors of the sum over all norms of the Gram of what the readers see, weighed by what the loss feels.

    SliceGPT (arXiv 2401.15024, section 3.2) takes the raw stream, where late blocks and tokens of huge norm decide
    everything; the readers see it normalised. gradients: [hidden, hidden], the covariance of the loss's gradient, which
    has its share (`weighting: loss`): directions that are small but matter then survive. Directions of massive
    activations (Sun et al., arXiv 2402.17762) come first: they are so few that no sum over tokens would keep them, and
    the attention sink rests on them. Raises ValueError on NaN.
    """
    matrix, centred = found.gram.matrix, model.family.centred
    if gradients is not None:
        matrix = felt(matrix, gradients)
    if not torch.isfinite(matrix + found.massive.matrix).all():
        raise ValueError("the stream's moments are not finite")
    kept = massive_directions(found.massive)
    hidden = model.config.hidden_size
    mean = torch.full((hidden, 1), hidden**-0.5, dtype=torch.float64, device=model.device)
    vectors = with_kept(kept, matrix, mean if centred else None)
    norms = len(model.blocks) * len(model.family.norms) + 1
    notes: dict[str, Any] = {
        "calibration_tokens_per_norm": found.gram.tokens / norms,
        "massive_activations": {"tokens_per_norm": found.massive.tokens / norms, "directions": kept.shape[1]},
    }
    return Basis(vectors, found.turned / (found.gram.tokens / norms), notes, centred)


def own_basis(model: StreamedModel, influence: Tensor, said: str, centred: bool = False) -> Basis:
    """For a stream that stays in its own basis: how much each block changes it, [blocks], is all there is to know."""
    hidden = model.config.hidden_size
    eye = torch.eye(hidden, dtype=torch.float64, device=model.device)
    return Basis(without_mean(hidden, model.device) if centred else eye, influence, {"basis": said}, centred)


def massive_directions(massive: Gram) -> Tensor:
    """Orthonormal directions that massive activations lie in: [hidden, 0 to MOST_MASSIVE]."""
    if not massive.tokens:
        return massive.matrix[:, :0]
    vectors, energies = principal_basis(massive.matrix)
    count = int((energies > MASSIVE_ENERGY * energies.sum()).sum())
    return vectors[:, : min(count, MOST_MASSIVE)]
