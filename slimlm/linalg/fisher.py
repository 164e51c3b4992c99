"""Low-rank Fisher matrices and their inverses: M-FAC without its loop.

F = B + (1/m) G^T G, with G: [m, d] one gradient a row, and B = lambda I (M-FAC, Frantar et al., arXiv 2107.03356). By
Woodbury's identity, with

    K = m I + G B^-1 G^T = L L^T,   V = L^-1 G B^-1,   F^-1 = B^-1 - V^T V,

which is what the paper's recursion over gradients arrives at, by one GEMM, one Cholesky factorisation of [m, m] and one
triangular product. Leading dimensions are a batch: blocks of a large Fisher matrix. K is factored in fp64: in fp32 what
is left of the diagonal cancels.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

BLOCK = 64  # gradients whose products are computed together, where only a triangle is wanted
CHUNK_ELEMENTS = 1 << 24  # of the factors [rows, m, in] held at once


@dataclass(frozen=True)
class LowRankInverse:
    """F^-1 = base I - factor^T factor. base: 1 / lambda."""

    base: float
    factor: Annotated[Tensor, "... m d"]

    def diagonal(self) -> Annotated[Tensor, "... d"]:
        """Of F^-1, in O(d m)."""
        return self.base - self.factor.square().sum(-2)

    def times(self, vector: Annotated[Tensor, "*rows d"]) -> Annotated[Tensor, "*rows d"]:
        """F^-1 x, in O(d m)."""
        inner = self.factor @ vector[..., None]
        return vector * self.base - (self.factor.mT @ inner)[..., 0]

    def matrix(self) -> Annotated[Tensor, "... d d"]:
        """F^-1 written out."""
        product = -(self.factor.mT @ self.factor)
        product.diagonal(dim1=-2, dim2=-1).add_(self.base)
        return product


def low_rank_inverse(gradients: Annotated[Tensor, "... m d"], base: float) -> LowRankInverse:
    """The inverse of B + (1/m) G^T G. base: lambda.

    The restriction of F to some of its coordinates is that of G: `low_rank_inverse(gradients[..., kept], ...)`.
    Raises ValueError for a lambda that is not positive, or gradients that are not finite.
    """
    if base <= 0:
        raise ValueError(f"the damping of a Fisher matrix must be positive, not {base:g}")
    root = _inverse_root(_lower_product(gradients) / base)
    return LowRankInverse(1 / base, _times_lower(root / base, gradients))


def token_inverse(
    x: Annotated[Tensor, "m in"],
    delta: Annotated[Tensor, "m out"],
    base: float,
    products: Annotated[Tensor, "m m"] | None = None,
) -> LowRankInverse:
    """The same for each row of a linear, from per-token gradients delta_tr x_t of row r: a factor [out, m, in].

    The tokens' inner products x x^T are shared by all rows, and may be given. Raises ValueError for gradients that are
    not finite.
    """
    through, scale = x / base, delta.T[..., None]
    products = x @ through.T if products is None else products / base
    root = _inverse_root(scale * products * scale.mT)
    return LowRankInverse(1 / base, (root * scale.mT) @ through)


@dataclass(frozen=True)
class BlockInverse:
    """Inverses of a row's Fisher matrix within blocks of neighbouring inputs."""

    blocks: Annotated[Tensor, "out blocks size size"]

    def diagonal(self) -> Annotated[Tensor, "out in"]:
        """Of all inverses."""
        return self.blocks.diagonal(dim1=-2, dim2=-1).flatten(1)

    def times(self, vector: Annotated[Tensor, "out in"]) -> Annotated[Tensor, "out in"]:
        """F^-1 x, row by row."""
        out, count, size, _ = self.blocks.shape
        return (self.blocks @ vector.view(out, count, size, 1)).reshape(vector.shape)


def block_inverse(
    x: Annotated[Tensor, "m in"], delta: Annotated[Tensor, "m out"], damping: float, size: int
) -> BlockInverse:
    """Inverse of lambda I + (1/m) sum_t delta_tr^2 x_t x_t^T for every row r, in blocks of `size` inputs.

    The empirical block Fisher of WoodFisher (Singh & Alistarh, arXiv 2004.14340) and oBERT (Kurtic et al., arXiv
    2203.07259), whose blocks also run along a row. `size` divides in. Raises ValueError for gradients that are not
    finite.
    """
    tokens, inputs = x.shape
    parts = x.view(tokens, inputs // size, size).permute(1, 0, 2)  # [blocks, m, size]
    return _block_inverse((delta.square().T[:, None, :, None] / tokens * parts).mT @ parts, damping)


def gradient_block_inverse(gradients: Annotated[Tensor, "out m in"], damping: float, size: int) -> BlockInverse:
    """The same from the gradients of every row written out. Raises ValueError as that does."""
    parts = gradients.unflatten(-1, (-1, size)).transpose(1, 2)  # [out, blocks, m, size]
    return _block_inverse(parts.mT @ parts / gradients.shape[1], damping)


def _block_inverse(fisher: Tensor, damping: float) -> BlockInverse:
    fisher.diagonal(dim1=-2, dim2=-1).add_(damping)
    return BlockInverse(torch.cholesky_inverse(_lower_factor(fisher)))


def _inverse_root(inner: Tensor) -> Tensor:
    """L^-1 for L L^T = m I + inner, of whose [..., m, m] the lower triangle counts."""
    system = inner.double()
    system.diagonal(dim1=-2, dim2=-1).add_(inner.shape[-1])
    lower = _lower_factor(system)
    eye = torch.eye(inner.shape[-1], dtype=lower.dtype, device=lower.device)
    root: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return root.to(inner.dtype)


def _lower_factor(system: Tensor) -> Tensor:
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(system)
    if failed.any():
        raise ValueError("a Fisher matrix is not positive definite: its gradients are not finite")
    return lower


def _lower_product(a: Tensor) -> Tensor:
    """The lower triangle of a a^T, by blocks: [..., m, m] for [..., m, d]."""
    product = a.new_zeros(*a.shape[:-1], a.shape[-2])
    for start in range(0, a.shape[-2], BLOCK):
        stop = start + BLOCK
        product[..., start:stop, :stop] = a[..., start:stop, :] @ a[..., :stop, :].mT
    return product


def _times_lower(lower: Tensor, matrix: Tensor) -> Tensor:
    """lower @ matrix, [..., m, m] and [..., m, d], without what is zero above the diagonal."""
    product = torch.empty_like(matrix)
    for start in range(0, matrix.shape[-2], BLOCK):
        stop = start + BLOCK
        torch.matmul(lower[..., start:stop, :stop], matrix[..., :stop, :], out=product[..., start:stop, :])
    return product
