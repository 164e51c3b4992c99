"""The basis of the residual stream: an orthonormal [hidden, hidden], most important directions first."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.linalg.gram import Gram, rms_normalise
from slimlm.linalg.pca import felt, leading, principal_basis, with_kept, without_mean
from slimlm.model.block import Block
from slimlm.model.stream import hooked
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
    """What one pass over the model finds out about its residual stream.

    gram: of the RMS-normalised stream over all norms, [hidden, hidden] fp64. massive: the same of massive activations
    only. turned: [blocks], summed 1 - cosine between a block's input and output.
    """

    def __init__(self, model: StreamedModel) -> None:
        hidden = model.config.hidden_size
        self.gram, self.massive = (Gram(hidden, model.device, torch.float64) for _ in range(2))
        self.turned = torch.zeros(len(model.blocks), dtype=torch.float64)
        self._normalise = partial(rms_normalise, eps=model.norm_eps, centred=model.family.centred)

    def state(self) -> dict[str, Tensor]:
        """All of it, for `load`: Grams [hidden, hidden], counts [2], turned [blocks]."""
        counts = torch.tensor([self.gram.tokens, self.massive.tokens])
        return {"gram": self.gram.matrix, "massive": self.massive.matrix, "counts": counts, "turned": self.turned}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave: Grams [hidden, hidden], counts [2], turned [blocks]."""
        self.gram.matrix, self.massive.matrix = (
            state[name].to(self.gram.matrix.device) for name in ("gram", "massive")
        )
        self.gram.tokens, self.massive.tokens = state["counts"].tolist()
        self.turned = state["turned"]

    def collect(self, walk: Iterable[Block], streams: Streams, norms: bool = True) -> None:
        """Move the stream "dense" through the blocks of a walk, its `state` being kept up.

        norms: whether what enters the blocks' norms is looked at, or only what leaves the last block.
        """
        if streams.state:
            self.load(streams.state)
        for block in walk:
            names = [norm.name for norm in block.family.norms if norms]
            with hooked((block.module.get_submodule(name), self._observe) for name in names):
                block.advance(streams["dense"], partial(self._turn, block.index))
            streams.state = self.state()
        for hidden in streams["dense"].hidden:
            self._add(hidden)

    def _observe(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._add(args[0])

    def _turn(self, index: int, before: Tensor, after: Tensor) -> None:
        self.turned[index] += float((1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)).sum())

    def _add(self, x: Tensor) -> None:
        x = x.flatten(0, -2)
        normalised = self._normalise(x)
        self.gram.add(normalised)
        size = x.float().square().mean(-1).sqrt()
        massive = size > MASSIVE * size.median()
        if massive.any():
            self.massive.add(normalised[massive])


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
