"""Deleting whole input units of a linear: structured optimal brain surgeon."""

import torch
from torch import Tensor

ROUNDS = 256
DAMPING = 0.01


def damped(gram: Tensor) -> Tensor:
    """gram: [n, n] with a hundredth of its mean diagonal added to the diagonal."""
    system = gram.clone()
    system.diagonal().add_(DAMPING * gram.diagonal().mean().clamp_min(1e-30))
    return system


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


def removal_order(gram: Tensor, weight: Tensor, size: int, count: int) -> Tensor:
    """Which `count` units of a linear to delete, cheapest first: int64 [count].

    gram: [in, in] of the linear's inputs; weight: [out, in]; a unit is `size` neighbouring inputs. Greedy: deleting
    unit u and moving all other weights optimally costs `tr(W_u (H^-1_uu)^-1 W_u^T)` (Hassibi & Stork 1992, with a group
    of weights for one; ZipLM, arXiv 2302.04089, eq. 3), with H the damped gram; then H^-1 and W are downdated. Where
    more than ROUNDS units go, several do between downdates.
    """
    units = gram.shape[0] // size
    inverse = torch.cholesky_inverse(_factor(damped(gram)))
    weight = weight.to(gram).clone()
    alive = torch.ones(units, dtype=torch.bool, device=gram.device)
    order: list[Tensor] = []
    for step in _steps(count):
        costs = unit_costs(inverse, weight, size).masked_fill(~alive, torch.inf)
        chosen = costs.argsort(stable=True)[:step]
        order.append(chosen)
        alive[chosen] = False
        columns = (chosen[:, None] * size + torch.arange(size, device=gram.device)).flatten()
        cross = inverse[columns]
        moved = torch.cholesky_solve(cross, _factor(cross[:, columns]))
        weight.addmm_(weight[:, columns], moved, alpha=-1)
        inverse.addmm_(cross.T, moved, alpha=-1)
        weight[:, columns] = 0
        inverse[columns, columns] = 1
    return torch.cat(order) if order else torch.empty(0, dtype=torch.long, device=gram.device)


def unit_costs(inverse: Tensor, weight: Tensor, size: int) -> Tensor:
    """Cost of deleting each unit alone: [in / size], from the inverse Gram [in, in] and weight [out, in]."""
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    units = inverse.shape[0] // size
    blocks = inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.T.reshape(units, size, -1)
    return (torch.cholesky_solve(columns, torch.linalg.cholesky(blocks)) * columns).sum((1, 2))


def compensated(gram: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """The weight [out, kept] on the inputs numbered `kept` that does best what weight: [out, in] did on all of them."""
    system = damped(gram)
    factor = _factor(system[kept][:, kept])
    return torch.cholesky_solve(system[kept] @ weight.to(gram).T, factor).T


def _steps(count: int) -> list[int]:
    """`count` split into at most ROUNDS parts as equal as can be."""
    rounds = min(count, ROUNDS)
    return [count // rounds + (index < count % rounds) for index in range(rounds)] if count else []
