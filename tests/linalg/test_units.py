import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlm.linalg.units import damp, removals, unit_costs


def problem(inputs: int = 12, outputs: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, inputs, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    return x.T @ x, torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)


def error(gram: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> float:
    """Least squares written out: what the best weight on `kept` still misses, under the damped Gram."""
    root = torch.linalg.cholesky(damp(gram.clone())).T
    solution = torch.linalg.lstsq(root[:, kept], root @ weight.T).solution
    return float((root[:, kept] @ solution - root @ weight.T).square().sum())


def others(inputs: int, size: int, gone: list[int]) -> torch.Tensor:
    return torch.tensor([i for i in range(inputs) if i // size not in gone])


@pytest.mark.parametrize("size", [1, 3])
def test_the_cost_of_a_unit_is_the_error_of_the_best_weight_without_it(size: int):
    gram, weight = problem()
    inverse = torch.linalg.inv(damp(gram.clone()))
    expected = [error(gram, weight, others(12, size, [unit])) for unit in range(12 // size)]
    assert unit_costs(inverse, weight, size).tolist() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_greedy_written_as_a_loop(size: int, seed: int):
    gram, weight = problem(seed=seed)
    gone: list[int] = []
    for _ in range(4):
        left = [unit for unit in range(12 // size) if unit not in gone]
        gone.append(min(left, key=lambda unit: error(gram, weight, others(12, size, [*gone, unit]))))
    root = torch.linalg.cholesky(damp(gram.clone())).T
    counts = [0, 2, 4]
    for count, (order, found) in zip(counts, removals(gram.clone(), weight, size, counts), strict=True):
        assert order.tolist() == gone[:count]
        kept = others(12, size, gone[:count])
        expected = torch.zeros_like(weight)
        expected[:, kept] = torch.linalg.lstsq(root[:, kept], root @ weight.T).solution.T
        assert torch.allclose(found, expected, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 20), st.integers(1, 7))
def test_exactly_as_many_as_asked_each_once_and_the_weight_untouched(units: int, size: int, count: int, rounds: int):
    count = min(count, units)
    gram, weight = problem(units * size)
    gram[0] = gram[:, 0] = 0  # a dead input is no obstacle
    before = weight.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimlm.linalg.units.ROUNDS", rounds)
        found = [(order, left.clone()) for order, left in removals(gram, weight, size, sorted({count // 2, count}))]
    assert [len(order) for order, _ in found] == sorted({count // 2, count})
    assert torch.equal(weight, before)
    for order, left in found:
        assert len(set(order.tolist())) == len(order)
        assert torch.equal(order, found[-1][0][: len(order)])
        dead = [unit for unit in range(units) if not left[:, unit * size : (unit + 1) * size].any()]
        assert dead == sorted(order.tolist())
