"""Moving a transformer's weights into another basis of its residual stream (SliceGPT, arXiv 2401.15024, section 3).

The stream x: [hidden] becomes x' = basis^T x with basis: [hidden, width], orthonormal columns. Weights are stored as
torch stores them: linears [out, in], embeddings [vocab, hidden].
"""

import math

from torch import Tensor


def rotate_embedding(weight: Tensor, basis: Tensor) -> Tensor:
    """weight: [vocab, hidden] -> [vocab, width]."""
    return weight @ basis.to(weight)


def rotate_reader(weight: Tensor, gain: Tensor, basis: Tensor) -> Tensor:
    """weight: [out, hidden] that reads `RMSNorm(x) * gain` -> [out, width] that reads an RMSNorm of x' without a gain.

    The sliced norm divides by the root mean square over width components instead of hidden ones; the factor
    `sqrt(hidden / width)` that makes up for it goes into the weight here rather than into the norm's gain, where
    bf16 would round it by up to 0.2% for the whole stream at once.
    """
    hidden, width = basis.shape
    return (weight * gain.to(weight)) @ (basis * math.sqrt(hidden / width)).to(weight)


def rotate_writer(weight: Tensor, basis: Tensor) -> Tensor:
    """weight: [..., hidden, in], or a bias: [hidden] -> [..., width, in] or [width]."""
    return basis.T.to(weight) @ weight
