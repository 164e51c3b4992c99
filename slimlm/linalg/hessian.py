"""Damped Gram matrices as curvature: Cholesky factors, and the inverse's.

H = gram + damping * mean(diag(gram)) * I, as in GPTQ (Frantar et al., arXiv 2210.17323). Everything is computed in the
precision of the gram.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
from torch import Tensor

from slimlm.linalg.cholesky import factor_in_place, invert_in_place

DAMPING = 0.01
TRIES = 5
Rows = slice | Annotated[Tensor, "rows", bool] | Annotated[Tensor, "rows", int]  # some of them
FISHER_SHARE = 0.5  # of the trace of a Gram with gradients beside it


class SingularCurvature(ValueError):
    """No damping up to 10^4 times the requested one made a Gram matrix positive definite."""


@dataclass(frozen=True)
class Hessian:
    """upper: U with U^T U the inverse; row i is what settling column i does to those right of it. damping: what it
    took, in mean diagonals.

    dead: inputs that are zero on every token; their rows and columns are those of the identity. Where only `upper` was
    wanted, matrix and inverse are empty: [0, 0] instead of [in, in].
    """

    matrix: Annotated[Tensor, "in_or_0 in_or_0"]  # damped
    inverse: Annotated[Tensor, "in_or_0 in_or_0"]
    upper: Annotated[Tensor, "in in"]
    damping: float
    dead: Annotated[Tensor, "in", bool]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def rows(self, rows: Rows) -> "Hessian":
        """The curvature of some rows only."""
        return self

    def to(self, dtype: torch.dtype) -> Self:
        """The same in another precision, but for the factor."""
        floats = ((name, value) for name, value in vars(self).items() if name not in ("dead", "damping", "upper"))
        return replace(self, **{name: value.to(dtype) for name, value in floats})

    def norms(self) -> Annotated[Tensor, "in"]:
        """Of the inputs, the damping in them."""
        return self.matrix.diagonal().sqrt()

    def apply(self, change: Annotated[Tensor, "out in"]) -> Annotated[Tensor, "out in"]:
        """d H, row by row."""
        return change @ self.matrix

    def diagonal(self) -> Annotated[Tensor, "in"]:
        """Of the inverse."""
        return self.inverse.diagonal()

    def times(self, vector: Annotated[Tensor, "*rows in"]) -> Annotated[Tensor, "*rows in"]:
        """H^-1 x."""
        return vector @ self.inverse


def hessian(gram: Annotated[Tensor, "in in"], damping: float = DAMPING, upper_only: bool = False) -> Hessian:
    """The damped curvature of a gram, its damping raised tenfold until it is positive definite.

    The gram is used up, as it may be the largest thing there is: it becomes `matrix`. upper_only: no more than that is
    wanted, and the rest let go of. Raises SingularCurvature when that does not help, or the gram is not finite.
    """
    dead = gram.diagonal() <= 0
    mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    gram[dead] = gram[:, dead] = 0
    added = 0.0
    for power in range(TRIES):
        gram.diagonal().add_((damping * 10**power - added) * mean)
        gram[dead, dead] = 1
        added = damping * 10**power
        inverse = gram.clone()
        if not invert_in_place(inverse):
            continue
        lower = factor_in_place(inverse if upper_only else inverse.clone())
        if lower is not None:
            nothing = gram.new_empty(0, 0)
            kept = (nothing, nothing) if upper_only else (gram, inverse)
            return Hessian(*kept, lower.mT, added, dead)
    most = damping * 10 ** (TRIES - 1)
    raise SingularCurvature(f"the Gram matrix of its inputs is singular, even with {most:g} of damping")


@dataclass(frozen=True)
class RowHessian(Hessian):
    """A Hessian of its own for every row r: H + sum_t weight_tr x_t x_t^T; inverse, upper and dead are H's.

    weight: not negative. Only `apply` sees the second term, by two GEMMs: what needs an
    inverse takes H's for near enough.
    """

    x: Annotated[Tensor, "tokens in"]
    weight: Annotated[Tensor, "tokens out"]

    def rows(self, rows: Rows) -> "RowHessian":
        return replace(self, weight=self.weight[:, rows])

    def apply(self, change: Annotated[Tensor, "out in"]) -> Annotated[Tensor, "out in"]:
        return change @ self.matrix + ((change @ self.x.T) * self.weight.T) @ self.x


def with_gradients(
    curvature: Hessian,
    x: Annotated[Tensor, "tokens in"],
    delta: Annotated[Tensor, "tokens out"],
    share: float = FISHER_SHARE,
) -> RowHessian:
    """The Gram as base, and per-token gradients delta_tr x_t of each row as low-rank term; `share` of the trace is its.

    Rows are scaled each by itself: how much a row matters to the loss does not change its own minimiser.
    """
    energy = delta.square() * x.square().sum(1, keepdim=True)
    weight = delta.square() / energy.sum(0).clamp_min(torch.finfo(delta.dtype).tiny)
    scale = curvature.matrix.diagonal().sum() * share / (1 - share)
    return RowHessian(**vars(curvature), x=x.to(scale), weight=(weight * scale).to(scale))


def quadratic_loss(change: Annotated[Tensor, "out in"], curvature: Hessian) -> Annotated[Tensor, "out"]:
    """d H d^T of each row d of a change."""
    return (curvature.apply(change) * change).sum(-1)
