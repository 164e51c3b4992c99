"""Damped Gram matrices as curvature: Cholesky factors, and the inverse's.

H = gram + damping * mean(diag(gram)) * I. Everything is computed in the precision of the gram.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
TRIES = 5


class SingularCurvature(ValueError):
    """No damping up to 10^4 times the requested one made a Gram matrix positive definite."""


@dataclass(frozen=True)
class Hessian:
    """matrix: [in, in], damped. inverse: [in, in]. upper: U with U^T U the inverse; row i is what settling column i
    does to those right of it. damping: what it took, in mean diagonals.

    dead: [in], inputs that are zero on every token; their rows and columns are those of the identity.
    """

    matrix: Tensor
    inverse: Tensor
    upper: Tensor
    damping: float
    dead: Tensor

    def diagonal(self) -> Tensor:
        """Of the inverse: [in]."""
        return self.inverse.diagonal()

    def times(self, vector: Tensor) -> Tensor:
        """H^-1 x for x: [..., in]."""
        return vector @ self.inverse


def hessian(gram: Tensor, damping: float = DAMPING) -> Hessian:
    """The damped curvature of gram: [in, in], its damping raised tenfold until it is positive definite.

    Raises SingularCurvature when that does not help, or the gram is not finite.
    """
    dead = gram.diagonal() <= 0
    mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    for power in range(TRIES):
        matrix = gram.clone()
        matrix.diagonal().add_(damping * 10**power * mean)
        matrix[dead] = matrix[:, dead] = 0
        matrix[dead, dead] = 1
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed or not torch.isfinite(factor).all():
            continue
        inverse = torch.cholesky_inverse(factor)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            return Hessian(matrix, inverse, upper, damping * 10**power, dead)
    most = damping * 10 ** (TRIES - 1)
    raise SingularCurvature(f"the Gram matrix of its inputs is singular, even with {most:g} of damping")


def quadratic_loss(change: Tensor, matrix: Tensor) -> Tensor:
    """Per row, d H d^T: [rows], for change d: [rows, in] and H: [in, in]."""
    return ((change @ matrix) * change).sum(-1)
