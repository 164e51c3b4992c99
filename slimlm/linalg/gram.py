"""Second moments of activations."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

CHUNK_TOKENS = 4096
FEWEST = 128  # tokens of which half a Gram is computed
ROWS, STRIPS = 256, 8  # of a Gram at a time: at least so many rows, and into how many strips it is cut at most
Sums = Annotated[Tensor, "..."]
WIDE = 2048  # inputs above which second moments are the largest thing there is, and kept in fp32


def is_wide(width: int) -> bool:
    """Whether second moments of so many inputs are too large to be held more than once."""
    return width > WIDE


def gram_dtype(width: int) -> torch.dtype:
    """What second moments of so many inputs are summed in."""
    return torch.float32 if is_wide(width) else torch.float64


def gram_bytes(width: int) -> int:
    """What second moments of so many inputs take."""
    return width**2 * gram_dtype(width).itemsize


def add_products(
    total: Annotated[Tensor, "in out"], x: Annotated[Tensor, "tokens in"], y: Annotated[Tensor, "tokens out"]
) -> None:
    """Add the sum over tokens of `x^T y`, in fp32 or fp64.

    Each chunk's product is a GEMM in the activations' own precision and is added in that of the total: GPUs without
    fast fp64 stay fast, and the sum over a long calibration set does not lose its small directions.
    """
    for some, other in zip(x.split(CHUNK_TOKENS), y.split(CHUNK_TOKENS), strict=True):
        if total.dtype == some.dtype:
            total.addmm_(some.T, other)  # without another matrix of this size
        else:
            total += some.T @ other


def add_gram(total: Annotated[Tensor, "width width"], x: Annotated[Tensor, "tokens width"]) -> None:
    """The same of `x^T x` to a symmetric total, little more than half of it computed: strips from the diagonal on.

    All of it for few tokens, whose product takes less than mirroring.
    """
    width = len(total)
    if len(x) < FEWEST:
        add_products(total, x, x)
        return
    size = max(ROWS, -(-width // STRIPS))
    for start in range(0, width, size):
        stop = start + size
        add_products(total[start:stop, start:], x[:, start:stop], x[:, start:])
        total[stop:, start:stop] = total[start:stop, stop:].T


class Gram:
    """Running sum of `x^T x` over tokens: [width, width], in fp64, or fp32 where it is WIDE.

    dtype: another precision of the sum; a basis of a wide stream needs fp64.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
        self.matrix = torch.zeros(width, width, dtype=dtype or gram_dtype(width), device=device)
        self.tokens = 0

    def add(self, x: Annotated[Tensor, "... width"]) -> None:
        """Add activations. Raises ValueError on another width."""
        if x.shape[-1] != self.matrix.shape[0]:
            raise ValueError(f"activations of width {x.shape[-1]} for a Gram of width {self.matrix.shape[0]}")
        x = x.reshape(-1, x.shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        add_gram(self.matrix, x)
        self.tokens += x.shape[0]

    def diagonal(self) -> Annotated[Tensor, "width"]:
        """The sums of squares."""
        return self.matrix.diagonal()

    def tensors(self) -> list[Sums]:
        """The sum [width, width] and the number of tokens [1]."""
        return [self.matrix, torch.tensor([self.tokens])]

    def replace(self, tensors: Sequence[Sums]) -> None:
        """Hold these instead: [width, width] and [1]."""
        self.matrix, self.tokens = tensors[0], int(tensors[1])

    def take(self) -> Annotated[Tensor, "width width"]:
        """The sum, to be used up: it is not kept here."""
        matrix, self.matrix = self.matrix, self.matrix.new_empty(0, 0)
        return matrix


class Squares(Gram):
    """Of a Gram the diagonal alone, `matrix` [width] in fp64: the running sum of activations' squares over tokens."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Annotated[Tensor, "tokens width"]) -> None:
        """Add activations."""
        self.matrix = self.matrix + x.double().square().sum(0)
        self.tokens += len(x)

    def diagonal(self) -> Annotated[Tensor, "width"]:
        """The sums."""
        return self.matrix

    def norms(self) -> Annotated[Tensor, "width"]:
        """Of the activations, fp32."""
        return self.matrix.sqrt().float()


def rms_normalise(
    x: Annotated[Tensor, "*tokens width"], eps: float, centred: bool = False
) -> Annotated[Tensor, "*tokens width"]:
    """x divided by its root mean square, without a gain (Zhang & Sennrich, arXiv 1910.07467, eq. 4).

    centred: its mean subtracted before, as LayerNorm does (Ba et al., arXiv 1607.06450, eq. 4).
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    x = x - x.mean(-1, keepdim=True) if centred else x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
