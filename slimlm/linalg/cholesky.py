"""Cholesky factorisation where the matrix lies: it may be the largest thing there is.

LAPACK works on columns, which are a symmetric matrix's rows: the transpose is factored without a copy.
"""

from typing import Annotated

import torch
from torch import Tensor


def factor_in_place(system: Annotated[Tensor, "n n"]) -> Annotated[Tensor, "n n"] | None:
    """Lower factor of a symmetric matrix, a view of its memory; None when that is not positive definite."""
    columns, info = system.mT, torch.empty((), dtype=torch.int32, device=system.device)
    _, failed = torch.linalg.cholesky_ex(columns, out=(columns, info))
    return None if failed else columns


def invert_in_place(system: Annotated[Tensor, "n n"]) -> bool:
    """Replace a symmetric positive definite matrix by its inverse; False, and spoilt, when it is not that."""
    factor = factor_in_place(system)
    if factor is None or not torch.isfinite(factor.diagonal()).all():  # a NaN anywhere comes to the diagonal
        return False
    torch.cholesky_inverse(factor, out=factor)
    return True
