"""Low-rank Fisher inverses against the dense inverse, and against the recursion of the M-FAC paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlm.linalg.fisher import LowRankInverse, block_inverse, low_rank_inverse, token_inverse


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check_queries(found: LowRankInverse, dense: torch.Tensor) -> None:
    inverse = torch.linalg.inv(dense)
    vector = randn(*dense.shape[:-1], seed=7)
    assert torch.allclose(found.matrix(), inverse, atol=1e-10)
    assert torch.allclose(found.diagonal(), inverse.diagonal(dim1=-2, dim2=-1), atol=1e-10)
    assert torch.allclose(found.times(vector), (inverse @ vector[..., None])[..., 0], atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 150), st.integers(2, 16), st.sampled_from([(), (3,), (2, 2)]))
def test_every_query_is_that_of_the_dense_inverse(m: int, d: int, batch: tuple[int, ...]):
    gradients = randn(*batch, m, d, seed=m)
    dense = 0.3 * torch.eye(d, dtype=torch.float64) + gradients.mT @ gradients / m
    before = gradients.clone()
    check_queries(low_rank_inverse(gradients, 0.3), dense)
    assert torch.equal(gradients, before)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(2, 12))
def test_per_token_gradients_share_their_inputs(m: int, out: int, d: int):
    x, delta = randn(m, d, seed=1), randn(m, out, seed=2)
    gradients = delta.T[..., None] * x
    dense = 0.5 * torch.eye(d, dtype=torch.float64) + gradients.mT @ gradients / m
    check_queries(token_inverse(x, delta, 0.5), dense)


def test_it_is_the_recursion_of_the_paper():
    """Section 3.1: F_i^-1 = F_(i-1)^-1 - v v^T / (m + g^T v) with v = F_(i-1)^-1 g, one gradient after another."""
    gradients, damping = randn(24, 60), 1e-3
    inverse = torch.eye(60, dtype=torch.float64) / damping
    for gradient in gradients:
        vector = inverse @ gradient
        inverse = inverse - torch.outer(vector, vector) / (24 + gradient @ vector)
    found = low_rank_inverse(gradients, damping).matrix()
    assert float((found - inverse).abs().max() / inverse.abs().max()) < 1e-10


def test_restricting_gradients_restricts_the_fisher_matrix():
    gradients, kept = randn(10, 12), torch.tensor([0, 3, 4, 11])
    dense = (0.1 * torch.eye(12, dtype=torch.float64) + gradients.T @ gradients / 10)[kept][:, kept]
    assert torch.allclose(low_rank_inverse(gradients[:, kept], 0.1).matrix(), torch.linalg.inv(dense), atol=1e-10)


def test_gradients_in_fp32_lose_no_more_than_its_digits():
    gradients = 3 * randn(64, 32).float()
    exact = torch.linalg.inv(1e-2 * torch.eye(32).double() + gradients.double().T @ gradients.double() / 64).diagonal()
    found = low_rank_inverse(gradients, 1e-2).diagonal()
    assert found.dtype == torch.float32
    assert exact.max() < 0.1 / 1e-2  # most of what the damping alone gives cancels
    assert torch.allclose(found.double(), exact, rtol=5e-3)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="damping of a Fisher matrix must be positive, not -1"):
        low_rank_inverse(randn(3, 4), -1)
    with pytest.raises(ValueError, match="gradients are not finite"):
        low_rank_inverse(randn(3, 4) * float("nan"), 1.0)


@pytest.mark.parametrize("size", [3, 4, 12])
def test_block_inverses_are_those_of_the_diagonal_blocks(size: int):
    x, delta = randn(20, 12), randn(20, 5, seed=1)
    found = block_inverse(x, delta, 0.2, size)
    vector = randn(5, 12, seed=2)
    for row in range(5):
        gradients = delta[:, row, None] * x
        fisher = 0.2 * torch.eye(12, dtype=torch.float64) + gradients.T @ gradients / 20
        inverse = torch.block_diag(*(torch.linalg.inv(fisher[i : i + size, i : i + size]) for i in range(0, 12, size)))
        assert torch.allclose(found.diagonal()[row], inverse.diagonal(), atol=1e-10)
        assert torch.allclose(found.times(vector)[row], inverse @ vector[row], atol=1e-10)
