"""A method that slimlm does not have: RIA (Zhang et al., ICLR 2024, openreview Tr0lPx9woF, eq. 3).

A weight counts by its share of its row and of its column, times the square root of the norm of its input. A mask is a
function of (weight, curvature, quota); what its curvature is annotated with says what it needs.

    python examples/new_method.py [MODEL]
"""

import sys

import torch
from torch import Tensor

import slimlm
from slimlm.methods import pruning
from slimlm.prune import updates
from slimlm.prune.group import Row
from slimlm.prune.masks import Chosen, HasNorms
from slimlm.prune.quota import Quota


def ria(weight: Tensor, curvature: HasNorms, quota: Quota) -> Chosen:
    """The smallest |w_ij| (1 / sum_i |w_ij| + 1 / sum_j |w_ij|) ||x_j||^(1/2) of each matrix: [out, in]."""
    parts = [part.abs() for part in weight.split(quota.rows)]  # matrices of one input, one below the other
    shares = torch.cat([part / part.sum(0) + part / part.sum(1, keepdim=True) for part in parts])
    return weight, quota.smallest(shares * curvature.norms().sqrt())


RIA = pruning(
    "ria",
    "set the weights to zero that have the smallest share of their row and column, times their input",
    "https://openreview.net/forum?id=Tr0lPx9woF",
    Row("diagonal", ria, updates.none),
)


def main(model: str = "llama", output: str = "llama-ria-50", **settings: int | bool | str) -> None:
    recipe = slimlm.one_step(model=model, method=RIA, sparsity=0.5, output_dir=output, **settings)
    manifest = slimlm.compress(recipe, overwrite=True).manifest
    print(f"{manifest['sparsity']['achieved']:.3f} of the pruned weights are zero, by {manifest['paper']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
