"""What is known of the loss around a matrix [out, in]: nothing, its inputs' norms, their Gram, gradients, or both.

A curvature has what it can tell and nothing else; which masks and updates it will do for follows from that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, get_type_hints

import torch
from torch import Tensor

from slimlm.errors import RunFailure
from slimlm.linalg.fisher import (
    CHUNK_ELEMENTS,
    BlockInverse,
    LowRankInverse,
    block_inverse,
    gradient_block_inverse,
    low_rank_inverse,
    token_inverse,
)
from slimlm.linalg.hessian import DAMPING, Hessian, RowHessian, SingularCurvature, hessian, with_gradients
from slimlm.statistics.token_gradients import TokenGradients

BLOCK = 64  # inputs of a row whose Fisher matrix WoodFisher keeps


class Curvature(Protocol):
    """What all have. dtype: the precision that pruning by it is computed in."""

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, rows: slice) -> "Curvature":
        """The same for some rows of the matrix."""


@dataclass(frozen=True)
class Flat:
    """Nothing is known."""

    dtype: torch.dtype = torch.float32

    def rows(self, rows: slice) -> "Flat":
        """The same."""
        return self


@dataclass(frozen=True)
class Norms:
    """Of the inputs: [in], fp32."""

    of_inputs: Tensor
    dtype: torch.dtype = torch.float32

    def rows(self, rows: slice) -> "Norms":
        """The same."""
        return self

    def norms(self) -> Tensor:
        """[in]."""
        return self.of_inputs


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
        """That of the gradients."""
        return self.gradients.x.dtype

    def rows(self, rows: slice) -> "RowFisher":
        """Of some rows only."""
        return replace(self, gradients=replace(self.gradients, delta=self.gradients.delta[:, rows]))

    def squares(self) -> Tensor:
        """Mean squares of the gradients, the diagonal of the matrix itself but for the damping: [out, in]."""
        return self.gradients.squares()

    def diagonal(self) -> Tensor:
        """Of the inverse: [out, in]."""
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


CURVATURES: dict[str, type[Curvature]] = {
    "none": Flat,
    "diagonal": Norms,
    "gram": Hessian,
    "gram+fisher": RowHessian,
    "fisher": RowFisher,
    "block-fisher": RowFisher,
}


def able(needing: Callable[..., tuple[Tensor, Tensor]]) -> list[str]:
    """The curvatures that have what a mask or an update, [out, in] each, is annotated to need of its own."""
    needed = get_type_hints(needing).get("curvature", Curvature)
    return [name for name, kind in CURVATURES.items() if needed is Curvature or issubclass(kind, needed)]


def damped(
    gram: Tensor,
    name: str,
    damping: float = DAMPING,
    gradients: Sequence[TokenGradients] = (),
    upper_only: bool = False,
) -> Hessian:
    """The damped gram: [in, in], which is used up, and beside it the gradients of linears stacked, if there are any.

    upper_only: as in `hessian`. Raises RunFailure with the linear's name when no damping helps.
    """
    try:
        found = hessian(gram, damping, upper_only)
    except SingularCurvature as error:
        raise RunFailure(f"{name} cannot be pruned: {error}") from error
    return with_gradients(found, gradients[0].x, torch.cat([g.delta for g in gradients], 1)) if gradients else found
