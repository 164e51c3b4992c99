import torch

from slimlm.families import FAMILIES
from slimlm.linalg.rotate import rotate_embedding, rotate_writer
from slimlm.model.rotation import seen_through


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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
