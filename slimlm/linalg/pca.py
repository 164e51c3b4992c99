"""Principal directions of a Gram matrix."""

import torch
from torch import Tensor


def principal_basis(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of a symmetric gram: [d, d], largest first.

    Returns (basis [d, d], columns orthonormal; eigenvalues [d], clamped at 0), fp64. SliceGPT, arXiv 2401.15024,
    section 3.2; because the columns are ordered, the basis for width d' is `basis[:, :d']`. Each column's largest
    component is made positive, so that the sign does not depend on the LAPACK build. Raises ValueError on NaN or Inf.
    """
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix holds NaN or Inf")
    gram = gram.double()
    eigenvalues, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    vectors = vectors.flip(-1)
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign(), eigenvalues.flip(-1).clamp_min(0)
