import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlm.linalg.budget import TOLERANCE, choose_width, nearest_width
from slimlm.linalg.gram import CHUNK_TOKENS, Gram, rms_normalise
from slimlm.linalg.pca import principal_basis
from slimlm.linalg.rotate import rotate_embedding, rotate_reader, rotate_writer


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_gram_is_the_sum_of_outer_products():
    x = randn(3, 7, 5)
    gram = Gram(5)
    gram.add(x)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for token in x.reshape(-1, 5):
        expected += token[:, None] * token[None, :]
    assert torch.allclose(gram.matrix, expected, atol=1e-12)
    assert gram.tokens == 21


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(4)), st.integers(1, 60))
def test_grams_merge_in_any_order(order, tokens):
    parts = [randn(tokens, 6, seed=seed) for seed in range(4)]
    whole, merged = Gram(6), Gram(6)
    whole.add(torch.cat(parts))
    for index in order:
        part = Gram(6)
        part.add(parts[index])
        merged.merge(part)
    assert torch.allclose(whole.matrix, merged.matrix, atol=1e-10)
    assert whole.tokens == merged.tokens


def test_gram_of_half_precision_activations_is_accumulated_without_losing_them():
    x = torch.full((3 * CHUNK_TOKENS, 2), 0.01, dtype=torch.bfloat16)
    gram = Gram(2)
    gram.add(x)
    assert gram.matrix[0, 0].item() == pytest.approx(x.shape[0] * x[0, 0].item() ** 2, rel=1e-6)
    assert gram.matrix.dtype == torch.float64


def test_gram_refuses_another_width():
    with pytest.raises(ValueError, match="width 3"):
        Gram(4).add(torch.zeros(2, 3))


def test_rms_normalise_is_what_the_stock_norm_does_without_its_gain():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(4, 9, 16)
    assert torch.allclose(rms_normalise(x, 1e-5), LlamaRMSNorm(16, eps=1e-5)(x), atol=1e-6)


def test_principal_basis_is_orthonormal_ordered_and_diagonalises():
    x = randn(50, 12)
    basis, eigenvalues = principal_basis(x.T @ x)
    assert torch.allclose(basis.T @ basis, torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert (eigenvalues.diff() <= 0).all()
    assert torch.allclose(basis.T @ (x.T @ x) @ basis, eigenvalues.diag(), atol=1e-9)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_principal_basis_keeps_more_than_any_other_of_the_same_width():
    x = randn(80, 10)
    basis, _ = principal_basis(x.T @ x)
    best = (x @ basis[:, :4]).square().sum()
    for seed in range(20):
        other, _ = torch.linalg.qr(randn(10, 4, seed=seed + 1))
        assert (x @ other).square().sum() <= best + 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_principal_basis_refuses_what_is_not_finite(bad: float):
    gram = torch.eye(3)
    gram[0, 1] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        principal_basis(gram)


def test_rotated_weights_compute_the_same_as_the_originals():
    hidden, out = 10, 6
    basis, _ = torch.linalg.qr(randn(hidden, hidden))
    x, gain, reader, writer = randn(4, hidden), randn(hidden, seed=1), randn(out, hidden), randn(hidden, out, seed=2)
    normalise = lambda v: v / v.square().mean(-1, keepdim=True).sqrt()  # noqa: E731
    before = (normalise(x) * gain) @ reader.T
    after = normalise(rotate_embedding(x, basis)) @ rotate_reader(reader, gain, basis).T
    assert torch.allclose(before, after, atol=1e-10)
    assert torch.allclose(basis @ (rotate_writer(writer, basis) @ before.T), writer @ before.T, atol=1e-10)


def test_a_stream_that_lives_in_fewer_directions_loses_nothing():
    hidden, width = 10, 4
    basis, _ = torch.linalg.qr(randn(hidden, width))
    x, gain, reader = randn(5, width) @ basis.T, randn(hidden, seed=1), randn(3, hidden)
    small = rotate_embedding(x, basis)
    before = (x / x.square().mean(-1, keepdim=True).sqrt() * gain) @ reader.T
    after = small / small.square().mean(-1, keepdim=True).sqrt() @ rotate_reader(reader, gain, basis).T
    assert torch.allclose(before, after, atol=1e-10)


@given(st.integers(8, 600), st.floats(0.001, 0.999), st.sampled_from([1, 2, 3, 4, 12]), st.sampled_from([None, 1, 8]))
def test_a_chosen_width_is_rounded_and_within_tolerance(full, sparsity, divisor, round_to):
    count = lambda width: 100 * width + 7  # noqa: E731
    dense = count(full)
    choice = choose_width(full, count, dense, sparsity, divisor, round_to)
    if choice is not None:
        assert 0 < choice.width < full
        assert choice.width % divisor == 0
        assert choice.width % (round_to or 1) == 0
        assert abs(1 - count(choice.width) / dense - sparsity) <= TOLERANCE
        assert choice.sparsity > 0
    else:
        near = nearest_width(full, count, dense, sparsity, math.lcm(round_to or 1, divisor))
        assert near is None or abs(near.sparsity - sparsity) > min(TOLERANCE, sparsity / 2)


@given(st.integers(2, 300), st.floats(0.001, 0.999), st.integers(1, 16), st.integers(0, 20_000))
def test_the_nearest_width_is_the_nearest_of_all(full, sparsity, multiple, extra):
    count = lambda width: 90 * width + extra  # noqa: E731
    dense = 100 * full
    near = nearest_width(full, count, dense, sparsity, multiple)
    everything = [abs(1 - count(width) / dense - sparsity) for width in range(multiple, full, multiple)]
    assert (near is None) == (not everything)
    if near is not None:
        assert abs(near.sparsity - sparsity) == pytest.approx(min(everything), abs=1e-12)


def test_round_widths_are_preferred():
    choice = choose_width(256, lambda width: width, 256, 0.25)
    assert (choice.width, choice.multiple) == (192, 64)
