"""Changes of low rank instead of all numbers of a matrix (LoRA, arXiv 2106.09685), a part of the matrix in the end.

A matrix W with zeros is trained as mask * (W + B A): what is trained is what is saved, zeros and all.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from slimlm.deal import seed_of


class LowRank(nn.Module):
    """To a weight [rows, columns] adds b [rows, rank] @ a [rank, columns], but where it is zero; b starts at zero."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        zeros = weight == 0
        self.zeros = zeros if zeros.any() else None
        drawn = torch.randn(rank, weight.shape[1], generator=generator) / math.sqrt(weight.shape[1])
        self.a = nn.Parameter(drawn.to(weight))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix as it is now: [rows, columns]."""
        with torch.autocast(weight.device.type, enabled=False):
            changed = torch.addmm(weight, self.b, self.a)
        return changed if self.zeros is None else changed.masked_fill(self.zeros, 0)


def adapt(model: nn.Module, matrices: Iterable[str], rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Have linears, by name, change by a rank, and nothing else of the model; what is to be trained, [...] by name."""
    model.requires_grad_(False)
    found: dict[str, nn.Parameter] = {}
    for number, name in enumerate(matrices):
        owner = model.get_submodule(name)
        generator = torch.Generator().manual_seed(seed_of(seed, number))
        change = LowRank(owner.get_parameter("weight").detach(), rank, generator)
        register_parametrization(owner, "weight", change)
        found |= {f"{name}.a": change.a, f"{name}.b": change.b}
    return found
