"""The inverse Fisher matrix of a window of gradients: M-FAC's dynamic algorithm (Frantar et al., arXiv 2107.03356,
section 3.2).

F = lambda I + (1/m) G^T G, with G: [m, d] one gradient a row. Woodbury's identity,

    F^-1 x = (x - G^T K^-1 G x) / lambda,   K = lambda m I + G G^T,

is what the paper's recursion comes to: its D are the pivots and rows of K / lambda, eliminated from the top, and its B
the inverse of that triangle. Any gradient can be replaced, in O(d m + m^3): a row of G G^T, and K factored anew.
A product takes O(d m + m^2). G G^T is kept, and K factored, in fp64.
"""

from typing import Annotated

import torch
from torch import Tensor


class GradientWindow:
    """The last gradients, [d] each, by blocks of neighbouring coordinates that have an inverse each; gradients that are
    still to come count as zero.

    gradients: [blocks, m, size]; products: G G^T of each, [blocks, m, m]. The last block is filled up with zeros.
    """

    def __init__(self, like: Annotated[Tensor, "d"], count: int, damping: float, size: int = 0) -> None:
        """count: m. damping: lambda. size: of a block; 0 for one block. Raises ValueError for a lambda that is not
        positive."""
        if damping <= 0:
            raise ValueError(f"the damping of a Fisher matrix must be positive, not {damping:g}")
        self.count, self.damping, self.length = count, damping, len(like)
        size = min(size, self.length) or self.length
        blocks = -(-self.length // size)
        self.gradients = like.new_zeros(blocks, count, size)
        self.products = like.new_zeros(blocks, count, count, dtype=torch.float64)
        self._factor: Tensor | None = None

    def replace(self, place: int, gradient: Annotated[Tensor, "d"]) -> Annotated[Tensor, "blocks m"]:
        """One of the m gradients by another one: O(d m). Its products with all, itself among them."""
        parts = self._in_blocks(gradient)
        self.gradients[:, place] = parts
        row = self._inner(parts)
        self.products[:, place] = row
        self.products[:, :, place] = row
        self._factor = None
        return row

    def times(
        self, vector: Annotated[Tensor, "d"], inner: Annotated[Tensor, "blocks m"] | None = None
    ) -> Annotated[Tensor, "d"]:
        """F^-1 x. inner: G x, where it is known. Raises ValueError for gradients that are not finite, or whose rounding
        is above lambda."""
        parts = self._in_blocks(vector)
        inner = self._inner(parts) if inner is None else inner
        solved = torch.cholesky_solve(inner[..., None], self.factor())
        inside = self.gradients.mT @ solved.to(parts.dtype)
        return ((parts - inside[..., 0]) / self.damping).flatten()[: self.length]

    def factor(self) -> Annotated[Tensor, "blocks m m"]:
        """L of K = L L^T: O(m^3), once for every change of the window. Raises ValueError as `times` does."""
        if self._factor is None:
            system = self.products.clone()
            system.diagonal(dim1=-2, dim2=-1).add_(self.damping * self.count)
            self._factor, failed = torch.linalg.cholesky_ex(system)
            if failed.any() or not self._factor.isfinite().all():
                raise ValueError(
                    f"a Fisher matrix is not positive definite: gradients are not finite, or {self.damping:g} is too "
                    "little damping for them"
                )
        return self._factor

    def _in_blocks(self, vector: Tensor) -> Tensor:
        """[blocks, size] of [d]."""
        blocks, _, size = self.gradients.shape
        if len(vector) < blocks * size:
            vector = torch.cat([vector, vector.new_zeros(blocks * size - len(vector))])
        return vector.view(blocks, size)

    def _inner(self, parts: Tensor) -> Tensor:
        """G x, [blocks, m] in fp64."""
        return (self.gradients @ parts[..., None])[..., 0].double()
