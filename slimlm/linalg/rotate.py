"""Moving a transformer's weights into another basis of its residual stream (SliceGPT, arXiv 2401.15024, section 3).

The stream x: [hidden] becomes x' = basis^T x with basis: [hidden, width], orthonormal columns. Weights are stored as
torch stores them: linears [out, in], embeddings [vocab, hidden].
"""

from torch import Tensor


def rotate_embedding(weight: Tensor, basis: Tensor) -> Tensor:
    """weight: [vocab, hidden] -> [vocab, width]."""
    return weight @ basis.to(weight)


def rotate_writer(weight: Tensor, basis: Tensor) -> Tensor:
    """weight: [..., hidden, in], or a bias: [hidden] -> [..., width, in] or [width]."""
    return basis.T.to(weight) @ weight
