"""Per-token gradients of every linear, and the Fisher information of a row from them.

The gradient of a token's loss with respect to row r of a linear is delta_r x, with x the linear's input and delta the
loss's gradient at its output. So a few tokens' x and delta say all there is to know; no gradient as large as a
weight is ever formed for a whole model. They are gathered in one reverse sweep and wait
on disk, in bf16, a file for each block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slimlm.errors import RunFailure, UserError
from slimlm.linalg.fisher import (
    CHUNK_ELEMENTS,
    BlockInverse,
    LowRankInverse,
    block_inverse,
    gradient_block_inverse,
    low_rank_inverse,
    token_inverse,
)
from slimlm.methods.gradients import TOKENS, Seen, reverse_sweep
from slimlm.recipe import PruneStep
from slimlm.walk import StreamedModel
from slimlm.work import Work

BLOCK = 64  # inputs of a row whose Fisher matrix WoodFisher keeps


@dataclass(frozen=True)
class TokenGradients:
    """x: [tokens, in] and delta: [tokens, out] of one linear, fp64.

    window: so many neighbouring tokens make up one gradient, that of a sequence; 1 where each token is for itself.
    """

    x: Tensor
    delta: Tensor
    window: int = 1

    def mean_square(self) -> Tensor:
        """Mean over gradients of their squares, and over all weights: the Fisher matrix's mean diagonal."""
        if self.window == 1:
            return (self.x.square().mean(1) * self.delta.square().mean(1)).mean()
        x, delta = self._by_window(self.x), self._by_window(self.delta)
        squares = ((x @ x.mT) * (delta @ delta.mT)).sum((1, 2))  # of sum_t delta_t x_t^T, without writing it out
        return squares.mean() / (x.shape[-1] * delta.shape[-1])

    def of_rows(self, rows: slice) -> Tensor:
        """The sequences' gradients with respect to some rows of the weight: [rows, sequences, in]."""
        found: Tensor = self._by_window(self.delta)[..., rows].mT @ self._by_window(self.x)
        return found.transpose(0, 1).contiguous()

    def _by_window(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1, self.window, tensor.shape[1])


@dataclass(frozen=True)
class RowFisher:
    """Inverse Fisher matrices of all rows, some rows at a time: lambda I + (1/m) sum_t delta_tr^2 x_t x_t^T, or of
    sequences' gradients g_s the sum over g_sr g_sr^T.

    block: neighbouring inputs whose correlations count; 0 for all of a row (M-FAC over rows), in low-rank form where
    there are fewer tokens than inputs.
    """

    gradients: TokenGradients
    damping: float
    block: int = 0

    def _parts(self) -> Iterator[tuple[slice, LowRankInverse | BlockInverse]]:
        x, delta = self.gradients.x, self.gradients.delta
        per_row = max(x.numel(), x.shape[1] * (self.block or x.shape[1]))
        rows = max(1, CHUNK_ELEMENTS // per_row)
        for start in range(0, delta.shape[1], rows):
            part = slice(start, min(start + rows, delta.shape[1]))
            if self.gradients.window > 1:
                yield part, self._of_sequences(self.gradients.of_rows(part))
            elif self.block or x.shape[0] >= x.shape[1]:
                yield part, block_inverse(x, delta[:, part], self.damping, self.block or x.shape[1])
            else:
                yield part, token_inverse(x, delta[:, part], self.damping, self._inner)

    def _of_sequences(self, gradients: Tensor) -> LowRankInverse | BlockInverse:
        if self.block or gradients.shape[1] >= gradients.shape[2]:
            return gradient_block_inverse(gradients, self.damping, self.block or gradients.shape[2])
        return low_rank_inverse(gradients, self.damping)

    @cached_property
    def _inner(self) -> Tensor:
        """Inner products of the tokens' inputs: [tokens, tokens], the same for all rows."""
        return self.gradients.x @ self.gradients.x.T

    @property
    def dtype(self) -> torch.dtype:
        return self.gradients.x.dtype

    def diagonal(self) -> Tensor:
        """[out, in]."""
        return self._diagonal

    @cached_property
    def _diagonal(self) -> Tensor:
        return torch.cat([inverse.diagonal() for _, inverse in self._parts()])

    def times(self, vector: Tensor) -> Tensor:
        """F^-1 x for x: [out, in]."""
        return torch.cat([inverse.times(vector[rows]) for rows, inverse in self._parts()])


def row_fisher(gradients: TokenGradients, damping: float, blocks: bool) -> RowFisher:
    """damping: in mean diagonals of the matrix's Fisher information."""
    inputs = gradients.x.shape[1]
    size = next(size for size in range(min(BLOCK, inputs), 0, -1) if inputs % size == 0) if blocks else 0
    return RowFisher(gradients, damping * max(float(gradients.mean_square()), 1e-30), size)


def gradient_numbers(recipe: PruneStep, model: StreamedModel) -> int:
    """How many numbers gathered gradients are."""
    assert recipe.max_seq_length is not None
    of_each = recipe.max_seq_length if recipe.fisher_unit == "sequence" else 1
    return int(min(TOKENS, recipe.fisher_samples * of_each) * sum(map(sum, model.matrices.values())))


def gather_gradients(model: StreamedModel, recipe: PruneStep, batches: list[Tensor], work: Work) -> None:
    """Leave the gradients of `recipe.fisher_samples` tokens, or of all tokens of so many windows, in the journal.

    Nothing is done where an earlier process did. Raises UserError for sequences where experts see single tokens.
    """
    family = model.family
    if all(work.journal.recall(_step(index)) for index in range(len(model.blocks))):
        return
    windows = torch.cat(batches)
    by_sequence = recipe.fisher_unit == "sequence"
    if by_sequence and family.experts:
        raise UserError("--fisher-unit sequence: an expert sees single tokens, not sequences")
    most = max(1, TOKENS // windows.shape[1])
    chosen = windows[: min(most, recipe.fisher_samples) if by_sequence else most].split(len(batches[0]))
    tokens = [batch.numel() for batch in chosen]
    wanted = 1.0 if by_sequence else min(1.0, recipe.fisher_samples / sum(tokens))
    generator = torch.Generator().manual_seed(recipe.seed)
    places = [torch.randperm(count, generator=generator)[: max(1, round(wanted * count))] for count in tokens]
    if by_sequence:
        places = [torch.arange(count) for count in tokens]
    found: dict[str, list[Tensor]] = {}

    def visit(index: int, number: int, seen: Seen) -> None:
        first = {names[0] for names in model.anatomy[index].inputs}
        place = places[number].to(model.device)
        for name, (x, out) in seen.items():
            assert out.grad is not None
            x, delta = x.detach().flatten(0, -2), out.grad.flatten(0, -2)
            of = place if len(x) == tokens[number] else _evenly(len(x), wanted, x.device)  # an expert sees some tokens
            if name in first:
                found.setdefault(f"{name}.x", []).append(x[of].bfloat16())
            found.setdefault(f"{name}.delta", []).append(delta[of].bfloat16())
        if number == len(chosen) - 1:
            tensors = {key: torch.cat(parts) for key, parts in found.items()}
            tensors["window"] = torch.tensor(windows.shape[1] if by_sequence else 1)
            if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                raise RunFailure(f"gradients in {family.block(index)} overflow in {model.dtype}")
            work.journal.keep(_step(index), tensors)
            found.clear()

    def linears(index: int) -> tuple[str, ...]:
        return model.anatomy[index].linears

    reverse_sweep(model, list(chosen), recipe.seed, recipe.fisher_labels, (linears, 1), visit, work)


def _evenly(count: int, share: float, device: torch.device) -> Tensor:
    """Numbers of a share of `count` tokens, one at least, evenly spread."""
    return torch.linspace(0, count - 1, max(1, round(share * count)), device=device).long()


def gradients_of(model: StreamedModel, work: Work, index: int) -> dict[str, TokenGradients]:
    """What `gather_gradients` left of a block, by linear; experts that no token reached are not there."""
    recalled = work.journal.recall(_step(index))
    if recalled is None:
        raise RunFailure(
            f"the gradients of {model.family.block(index)} are gone from {work.journal.directory}: start over"
        )
    _, saved = recalled
    tensors = {name: tensor.to(model.device).double() for name, tensor in saved.items()}
    window = int(tensors.pop("window"))
    return {
        name: TokenGradients(tensors[f"{first}.x"], tensors[f"{name}.delta"], window)
        for name, first in model.anatomy[index].first_of.items()
        if f"{name}.delta" in tensors
    }


def gradient_names(work: Work, index: int) -> set[str]:
    """The linears of a block whose gradients `gather_gradients` left."""
    recalled = work.journal.recall(_step(index))
    return {name.removesuffix(".delta") for name in recalled[1] if name.endswith(".delta")} if recalled else set()


def _step(index: int) -> str:
    return f"gradients-{index}"
