"""Moving a transformer's weights into another basis of its residual stream (SliceGPT, arXiv 2401.15024, section 3).

The stream x: [hidden] becomes x' = basis^T x with basis: [hidden, width], orthonormal columns. Weights are stored as
torch stores them: linears [out, in], embeddings [vocab, hidden].
"""

from typing import Annotated

from torch import Tensor


def rotate_embedding(
    weight: Annotated[Tensor, "vocab hidden"], basis: Annotated[Tensor, "hidden width"]
) -> Annotated[Tensor, "vocab width"]:
    """An embedding, or a linear that reads the stream, of the stream in that basis."""
    return weight @ basis.to(weight)


def rotate_writer(
    weight: Annotated[Tensor, "*experts hidden in"] | Annotated[Tensor, "hidden"],
    basis: Annotated[Tensor, "hidden width"],
) -> Annotated[Tensor, "*experts width in"] | Annotated[Tensor, "width"]:
    """A linear that writes to the stream, or its bias, of the stream in that basis."""
    return basis.T.to(weight) @ weight
