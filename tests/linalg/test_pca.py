import pytest
import torch

from slimlm.linalg.pca import felt, principal_basis, with_kept


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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
