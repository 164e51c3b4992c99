import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlm.families import FAMILIES
from slimlm.linalg.budget import LossCurve, isotonic, predicted_loss, rise_of, spaced
from slimlm.linalg.gram import CHUNK_TOKENS, Gram, rms_normalise
from slimlm.linalg.pca import felt, principal_basis, with_kept
from slimlm.linalg.rotate import rotate_embedding, rotate_writer
from slimlm.model.rotation import seen_through


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
def test_tokens_come_in_any_order(order, tokens):
    parts = [randn(tokens, 6, seed=seed) for seed in range(4)]
    whole, summed = Gram(6), Gram(6)
    whole.add(torch.cat(parts))
    for index in order:
        summed.add(parts[index])
    assert torch.allclose(whole.matrix, summed.matrix, atol=1e-10)
    assert whole.tokens == summed.tokens


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
    after = (
        normalise(rotate_embedding(x, basis))
        @ (reader @ seen_through({"weight": gain}, FAMILIES["llama"], basis).double()).T
    )
    assert torch.allclose(before, after, atol=1e-5)
    assert torch.allclose(basis @ (rotate_writer(writer, basis) @ before.T), writer @ before.T, atol=1e-10)


def test_a_stream_that_lives_in_fewer_directions_loses_nothing():
    hidden, width = 10, 4
    basis, _ = torch.linalg.qr(randn(hidden, width))
    x, gain, reader = randn(5, width) @ basis.T, randn(hidden, seed=1), randn(3, hidden)
    small = rotate_embedding(x, basis)
    before = (x / x.square().mean(-1, keepdim=True).sqrt() * gain) @ reader.T
    seen = seen_through({"weight": gain}, FAMILIES["llama"], basis).double()
    after = small / small.square().mean(-1, keepdim=True).sqrt() @ (reader @ seen).T
    assert torch.allclose(before, after, atol=1e-5)


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=5), st.integers(1, 50))
def test_a_loss_curve_goes_through_its_points_and_never_falls_where_they_rise(losses: list[float], step: int):
    points = [((index + 1) * step, loss) for index, loss in enumerate(sorted(losses))]
    curve = LossCurve(points)
    assert curve(0) == 0
    for removed, loss in points:
        assert curve(removed) == pytest.approx(loss, rel=1e-9)
    along = [curve(removed) for removed in range(points[-1][0] + 1)]
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(along))
    assert curve(points[-1][0] + 1) == math.inf


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 0.5)), min_size=1, max_size=6))
def test_a_noisy_loss_curve_rises_and_is_never_free(measured: list[tuple[float, float]]):
    points = [(10 * (index + 1), loss) for index, (loss, _) in enumerate(measured)]
    errors = [error for _, error in measured]
    curve = LossCurve(points, errors)
    at = [curve(units) for units, _ in points]
    assert at == sorted(at)
    assert min(at) >= min(max(loss, error, 1e-6) for loss, error in measured) - 1e-12
    assert sum(at) == pytest.approx(sum(max(loss, error, 1e-6) for loss, error in measured))  # averaged, not moved
    assert 0 < curve(1) <= at[0] / 10 + 1e-12  # a little of what is noise is no dearer than linear


def test_losses_that_fall_are_averaged():
    assert isotonic([1.0, 3.0, 2.0, 2.5, 4.0]) == [1.0, 2.5, 2.5, 2.5, 4.0]
    assert LossCurve([(1, 0.05), (2, 0.01)])(2) == pytest.approx(0.03)


def test_a_rise_is_paired():
    before = torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64)
    rise, error = rise_of(before + torch.tensor([0.1, 0.2, 0.3]), before)
    assert (rise, error) == (pytest.approx(0.2), pytest.approx(0.1 / 3**0.5))
    assert rise_of(before[:1], before[:1]) == (0, 0)


def test_a_power_law_is_followed_between_its_points():
    curve = LossCurve([(8, 8**2.5), (16, 16**2.5), (32, 32**2.5)])
    assert [curve(units) for units in (4, 20, 32)] == pytest.approx([units**2.5 for units in (4, 20, 32)])
    assert LossCurve([])(3) == math.inf
    assert predicted_loss({"a": curve, "b": LossCurve([(2, 6.0)])}, {"a": 8, "b": 1}) == pytest.approx(8**2.5 + 3)


@given(st.integers(1, 500), st.integers(1, 16), st.integers(1, 6))
def test_points_are_multiples_up_to_the_largest(largest: int, multiple: int, count: int):
    points = spaced(largest, multiple, count)
    assert len(points) <= count
    assert points == sorted(set(points))
    assert all(0 < point <= largest and point % multiple == 0 for point in points)
    assert not points or points[-1] == largest // multiple * multiple


def test_directions_to_keep_come_first_and_the_rest_diagonalises_what_is_left():
    gram = randn(12, 12)
    gram = gram @ gram.T
    kept, _ = torch.linalg.qr(randn(12, 2, seed=1))
    basis = with_kept(kept, gram)
    assert torch.allclose(basis.T @ basis, torch.eye(12, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(basis[:, :2], kept)
    rest = basis[:, 2:].T @ gram @ basis[:, 2:]
    assert torch.allclose(rest, torch.diag(rest.diagonal()), atol=1e-9)
    assert (rest.diagonal().diff() <= 1e-9).all()
    assert torch.equal(with_kept(kept[:, :0], gram), principal_basis(gram)[0])


def test_what_the_loss_feels_counts_only_where_the_stream_is():
    gram, gradients = torch.diag(torch.tensor([8.0, 4.0, 1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0, 9.0, 90.0]))
    mixed = felt(gram, gradients)
    assert torch.allclose(mixed, torch.diag(mixed.diagonal()), atol=1e-12)
    assert mixed[3, 3] == 0
    assert mixed[2, 2] > mixed[1, 1] > 0
    assert mixed.trace() == pytest.approx(2)
