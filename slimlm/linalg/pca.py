"""Principal directions of a Gram matrix."""

from typing import Annotated

import torch
from torch import Tensor

from slimlm.linalg.finite import all_finite


def principal_basis(gram: Annotated[Tensor, "d d"]) -> tuple[Annotated[Tensor, "d d"], Annotated[Tensor, "d"]]:
    """Eigenvectors and eigenvalues of a symmetric gram, largest first.

    Returns (basis, columns orthonormal; eigenvalues, clamped at 0), fp64. SliceGPT, arXiv 2401.15024,
    section 3.2; because the columns are ordered, the basis for width d' is `basis[:, :d']`. Each column's largest
    component is made positive, so that the sign does not depend on the LAPACK build. Raises ValueError on NaN or Inf.
    """
    if not all_finite(gram):
        raise ValueError("the Gram matrix holds NaN or Inf")
    gram = gram.double()
    eigenvalues, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    vectors = vectors.flip(-1)
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign(), eigenvalues.flip(-1).clamp_min(0)


def with_kept(
    kept: Annotated[Tensor, "d k"], gram: Annotated[Tensor, "d d"], last: Annotated[Tensor, "d l"] | None = None
) -> Annotated[Tensor, "d d"]:
    """An orthonormal basis: the `kept` directions (orthonormal), then gram's in what is left.

    last: orthonormal and at right angles to `kept`, comes at the end.
    """
    gram = gram.double()
    last = kept[:, :0] if last is None else last
    fixed = torch.cat([kept, last], dim=1)
    if fixed.shape[1] == 0:
        return principal_basis(gram)[0]
    outside = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device) - fixed @ fixed.T
    # A direction of its own below zero sorts what is fixed behind all that is left.
    rest, _ = principal_basis(outside @ gram @ outside - gram.trace() * (fixed @ fixed.T))
    return torch.cat([kept, rest[:, : gram.shape[0] - fixed.shape[1]], last], dim=1)


def without_mean(width: int, device: torch.device | str = "cpu") -> Annotated[Tensor, "{width} {width}"]:
    """An orthonormal matrix whose last column is the all-ones direction: a Householder reflection, fp64."""
    ones = torch.full((width,), width**-0.5, dtype=torch.float64, device=device)
    normal = ones.clone()
    normal[-1] -= 1
    eye = torch.eye(width, dtype=torch.float64, device=device)
    return eye - 2 * torch.outer(normal, normal) / normal.square().sum().clamp_min(1e-30)


def leading(vectors: Annotated[Tensor, "d d"], width: int, centred: bool) -> Annotated[Tensor, "d {width}"]:
    """The first directions of a basis for a stream of `width`.

    centred: the stream goes through LayerNorm, and the last of `vectors` is the all-ones direction. Then the first
    width - 1 are put at right angles to the all-ones direction of the narrower stream, whose mean is always zero.
    """
    if not centred:
        return vectors[:, :width].contiguous()
    return vectors[:, : width - 1] @ without_mean(width, vectors.device)[:, : width - 1].T


def felt(gram: Annotated[Tensor, "d d"], gradients: Annotated[Tensor, "d d"]) -> Annotated[Tensor, "d d"]:
    """`G + G^1/4 C G^1/4`, both of unit trace: the stream's Gram G, and what the loss feels of it.

    C is the covariance of the loss's gradient. Alone it would keep directions nothing ever lies in; the powers
    of G leave those out. Chosen among mixtures by held-out loss; see docs/slicing.md.
    """
    energies, vectors = torch.linalg.eigh(gram.double())
    root = (vectors * energies.clamp_min(0).pow(0.25)) @ vectors.T
    weighed = root @ gradients.double() @ root
    mixed: Tensor = gram.double() / gram.trace() + weighed / weighed.trace().clamp_min(1e-30)
    return mixed
