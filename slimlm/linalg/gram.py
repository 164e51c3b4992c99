"""Second moments of activations."""

from typing import Annotated

import torch
from torch import Tensor

CHUNK_TOKENS = 4096


class Gram:
    """Running sum of `x^T x` over tokens, [width, width] in fp64.

    Each chunk's product is a GEMM in the activations' own precision (fp32 at least) and is added in fp64: GPUs
    without fast fp64 stay fast, and the sum over a long calibration set does not lose its small directions.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Annotated[Tensor, "... width"]) -> None:
        """Add activations. Raises ValueError on another width."""
        if x.shape[-1] != self.matrix.shape[0]:
            raise ValueError(f"activations of width {x.shape[-1]} for a Gram of width {self.matrix.shape[0]}")
        x = x.reshape(-1, x.shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        for chunk in x.split(CHUNK_TOKENS):
            self.matrix += chunk.T @ chunk
        self.tokens += x.shape[0]

    def merge(self, other: "Gram") -> None:
        """Add the statistics of other tokens, gathered elsewhere."""
        self.matrix += other.matrix.to(self.matrix.device)
        self.tokens += other.tokens


def rms_normalise(
    x: Annotated[Tensor, "*tokens width"], eps: float, centred: bool = False
) -> Annotated[Tensor, "*tokens width"]:
    """x divided by its root mean square, without a gain (Zhang & Sennrich, arXiv 1910.07467, eq. 4).

    centred: its mean subtracted before, as LayerNorm does (Ba et al., arXiv 1607.06450, eq. 4).
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
