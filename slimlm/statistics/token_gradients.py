"""Per-token gradients of every linear.

The gradient of a token's loss with respect to row r of a linear is delta_r x, with x the linear's input and delta the
loss's gradient at its output. So a few tokens' x and delta say all there is to know; no gradient as large as a
weight is ever formed for a whole model. They are gathered in one reverse sweep and wait
on disk, in bf16, a file for each block.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.deal import Deal
from slimlm.errors import RunFailure
from slimlm.linalg.finite import all_finite
from slimlm.linalg.fisher import CHUNK_ELEMENTS
from slimlm.model.block import Block
from slimlm.model.streamed import StreamedModel
from slimlm.ranks import Ranks
from slimlm.statistics.sweep import TOKENS, Losses, Seen, Walks, sweep


@dataclass(frozen=True)
class TokenGradients:
    """x: [tokens, in] and delta: [tokens, out] of one linear, fp64.

    window: so many neighbouring tokens make up one gradient, that of a sequence; 1 where each token is for itself.
    """

    x: Tensor
    delta: Tensor
    window: int = 1

    def mean_square(self) -> Tensor:
        """Mean over gradients and weights of the squares, a scalar []: the Fisher matrix's mean diagonal."""
        if self.window == 1:
            return (self.x.square().mean(1) * self.delta.square().mean(1)).mean()
        x, delta = self._by_window(self.x), self._by_window(self.delta)
        squares = ((x @ x.mT) * (delta @ delta.mT)).sum((1, 2))  # of sum_t delta_t x_t^T, without writing it out
        return squares.mean() / (x.shape[-1] * delta.shape[-1])

    def squares(self) -> Tensor:
        """Mean over gradients of their squares: [out, in]."""
        if self.window == 1:
            return self.delta.square().T @ self.x.square() / len(self.x)
        step = max(1, CHUNK_ELEMENTS // (self.x.numel() // self.window))
        starts = range(0, self.delta.shape[1], step)
        return torch.cat([self.of_rows(slice(start, start + step)).square().mean(1) for start in starts])

    def of_rows(self, rows: slice) -> Tensor:
        """The sequences' gradients with respect to some rows of the weight: [rows, sequences, in]."""
        found: Tensor = self._by_window(self.delta)[..., rows].mT @ self._by_window(self.x)
        return found.transpose(0, 1).contiguous()

    def _by_window(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1, self.window, tensor.shape[1])


@dataclass(frozen=True)
class Sample:
    """Which gradients are kept: of so many tokens, or of so many whole windows (`by_sequence`)."""

    count: int
    by_sequence: bool
    seed: int

    def numbers(self, model: StreamedModel, length: int) -> int:
        """How many numbers they are, for windows of so many tokens."""
        of_each = length if self.by_sequence else 1
        return int(min(TOKENS, self.count * of_each) * sum(map(sum, model.matrices.values())))

    def places(self, batches: Sequence[Tensor]) -> tuple[list[Tensor], float]:
        """Which of each batch's tokens, int64 [kept], and the share of all that these are."""
        tokens = [batch.numel() for batch in batches]
        if self.by_sequence:
            return [torch.arange(count) for count in tokens], 1.0
        wanted = min(1.0, self.count / sum(tokens))
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randperm(count, generator=generator)[: max(1, round(wanted * count))] for count in tokens], wanted


def gather_gradients(
    model: StreamedModel, losses: Losses, walks: Walks, sample: Sample
) -> Iterator[tuple[Block, dict[str, Tensor]]]:
    """Every block, from the last to the first, and the gradients of its linears as `gradients_of` takes them: bf16,
    inputs [tokens, in] once for all linears that share them, and at outputs [tokens, out]; of all ranks, for all.

    Raises RunFailure naming the block where they are not finite.
    """
    length = losses.batches[0].shape[1]
    places, share = sample.places(losses.batches)
    own = Deal(losses.ranks, len(losses.batches)).mine
    found: dict[str, list[Tensor]] = {}
    for block, batches in sweep(model, losses, walks, lambda block: block.family.linears, 1):
        for number, seen in batches:
            index = own[number]
            _keep(found, seen, block.family.first_of, (places[index], losses.batches[index].numel(), share))
        joined = _joined(block, found, losses.ranks)
        if losses.ranks.first and not all(all_finite(rows) for rows in joined.values()):
            raise RunFailure(f"gradients in {block.path} overflow in {model.dtype}")
        joined["window"] = torch.tensor(length if sample.by_sequence else 1)
        yield block, joined
        joined.clear()


def _joined(block: Block, found: dict[str, list[Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """All batches' rows of all ranks, [tokens, ...] each; what was found is used up, so that not all of it is there
    twice."""
    keys = dict.fromkeys(ranks.chained(list(found)))
    empty = torch.zeros(0, dtype=torch.bfloat16, device=block.model.device)
    return {key: ranks.joined(torch.cat(found.pop(key)) if key in found else empty) for key in keys}


def _keep(
    found: dict[str, list[Tensor]], seen: Seen, first_of: Mapping[str, str], sample: tuple[Tensor, int, float]
) -> None:
    """Add a batch's to what was found. sample: which of its tokens, how many it has, and the share that is kept."""
    place, tokens, share = sample
    for name, (x, out) in seen.items():
        assert out.grad is not None
        x, delta = x.detach().flatten(0, -2), out.grad.flatten(0, -2)
        # An expert sees some tokens.
        kept = place.to(x.device) if len(x) == tokens else _evenly(len(x), share, x.device)
        if name == first_of[name]:
            found.setdefault(f"{name}.x", []).append(x[kept].bfloat16())
        found.setdefault(f"{name}.delta", []).append(delta[kept].bfloat16())


def _evenly(count: int, share: float, device: torch.device) -> Tensor:
    """Numbers of a share of `count` tokens, one at least, evenly spread."""
    return torch.linspace(0, count - 1, max(1, round(share * count)), device=device).long()


def gradients_of(block: Block, saved: Mapping[str, Tensor]) -> dict[str, TokenGradients]:
    """What `gather_gradients` found of a block ([tokens, in] and [tokens, out]), by linear; experts that no token
    reached are not there."""
    tensors = {name: tensor.to(block.model.device).double() for name, tensor in saved.items()}
    window = int(tensors.pop("window"))
    return {
        name: TokenGradients(tensors[f"{first}.x"], tensors[f"{name}.delta"], window)
        for name, first in block.family.first_of.items()
        if f"{name}.delta" in tensors
    }
