"""Deleting whole input units of a linear: structured optimal brain surgeon."""

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from torch import Tensor

from slimlm.linalg.cholesky import invert_in_place

ROUNDS = 64
DAMPING = 0.01


def damp(gram: Annotated[Tensor, "n n"]) -> Annotated[Tensor, "n n"]:
    """Add a hundredth of its mean diagonal to the diagonal of a gram, in place."""
    gram.diagonal().add_(DAMPING * gram.diagonal().mean().clamp_min(1e-30))
    return gram


def removals(
    gram: Annotated[Tensor, "in in"], weight: Annotated[Tensor, "out in"], size: int, counts: Sequence[int]
) -> Iterator[tuple[Annotated[Tensor, "count", int], Annotated[Tensor, "out in"]]]:
    """For each of `counts`, ascending: the units of a linear to delete, cheapest first, and the weight
    without them. The next to come is computed in that weight.

    gram: of the linear's inputs; a unit is `size` neighbouring inputs. Greedy: deleting
    unit u and moving all other weights optimally costs `tr(W_u (H^-1_uu)^-1 W_u^T)` (Hassibi & Stork 1992, with a group
    of weights for one; ZipLM, arXiv 2302.04089, eq. 3), with H the damped gram; then H^-1 and W are downdated. Where
    more than ROUNDS units go, several do between downdates. A weight without units is zero there, and for
    the units that are left the one that does best what all did. The gram is used up.

    Raises ValueError for a gram that is not positive semi-definite.
    """
    units = gram.shape[0] // size
    inverse = damp(gram)
    if not invert_in_place(inverse):
        raise ValueError("a Gram matrix is not positive definite, even damped")
    weight = weight.to(gram, copy=True)
    alive = torch.ones(units, dtype=torch.bool, device=gram.device)
    order = torch.empty(0, dtype=torch.long, device=gram.device)
    if 0 in counts:
        yield order, weight
    for step in _steps(counts):
        costs = unit_costs(inverse, weight, size).masked_fill(~alive, torch.inf)
        chosen = costs.argsort(stable=True)[:step]
        order = torch.cat([order, chosen])
        alive[chosen] = False
        columns = (chosen[:, None] * size + torch.arange(size, device=gram.device)).flatten()
        cross = inverse[columns]
        moved = torch.cholesky_solve(cross, _factor(cross[:, columns]))
        weight.addmm_(weight[:, columns], moved, alpha=-1)
        inverse.addmm_(cross.T, moved, alpha=-1)
        weight[:, ~alive.repeat_interleave(size)] = 0  # those gone before gather rounding errors
        inverse[columns, columns] = 1
        if len(order) in counts:
            yield order, weight


def unit_costs(
    inverse: Annotated[Tensor, "in in"], weight: Annotated[Tensor, "out in"], size: int
) -> Annotated[Tensor, "units"]:
    """Cost of deleting each unit of `size` inputs alone, from the inverse Gram and the weight."""
    if size == 1:
        norms: Tensor = torch.linalg.vector_norm(weight, dim=0)
        return norms.square() / inverse.diagonal()
    units = inverse.shape[0] // size
    blocks = inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.T.reshape(units, size, -1)
    return (torch.cholesky_solve(columns, torch.linalg.cholesky(blocks)) * columns).sum((1, 2))


def _factor(system: Tensor) -> Tensor:
    """Cholesky factor of [n, n], its diagonal raised, tenfold each time, where rounding made it indefinite.

    Raises ValueError when that does not help either.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(system)
    for power in (-6, -5, -4, -3):
        if not failed:
            return factor
        raised = system.clone()
        raised.diagonal().add_(10.0**power * system.diagonal().mean().abs())
        factor, failed = torch.linalg.cholesky_ex(raised)
    if failed:
        raise ValueError("a Gram matrix is not positive definite, even damped")
    return factor


def _steps(counts: Sequence[int]) -> list[int]:
    """How many units go between downdates: ROUNDS steps about equal, none across one of `counts`."""
    most = -(-max(counts, default=0) // ROUNDS)
    steps: list[int] = []
    for start, stop in zip((0, *sorted(counts)), sorted(counts), strict=False):
        rounds = -(-(stop - start) // most) if stop > start else 0
        steps += [(stop - start) // rounds + (index < (stop - start) % rounds) for index in range(rounds)]
    return steps
