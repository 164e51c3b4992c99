"""The inverse Fisher matrix of a window of gradients against the recursion as published."""

import pytest
import torch
from torch import Tensor

from slimlm.linalg.window import GradientWindow


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def recursion(gradients: Tensor, damping: float) -> Tensor:
    """F^-1 written out, gradient after gradient (arXiv 2107.03356, equation 2)."""
    m, d = gradients.shape
    inverse = torch.eye(d, dtype=gradients.dtype) / damping
    for gradient in gradients:
        moved = inverse @ gradient
        inverse -= torch.outer(moved, moved) / (m + gradient @ moved)
    return inverse


def dynamic(gradients: Tensor, damping: float, x: Tensor) -> Tensor:
    """F^-1 x by the paper's D and B, entry by entry (section 3.2): D_ij = g_i^T F_(i-1)^-1 g_j for j >= i, and
    F_(i-1)^-1 g_i = sum_k B_ik g_k."""
    m, products = len(gradients), gradients @ gradients.T / damping
    d, b = torch.zeros(m, m, dtype=x.dtype), torch.zeros(m, m, dtype=x.dtype)
    for i in range(m):
        for j in range(i, m):
            d[i, j] = products[i, j] - sum(d[k, i] * d[k, j] / (m + d[k, k]) for k in range(i))
        b[i, i] = 1 / damping
        for k in range(i):
            b[i] -= d[k, i] / (m + d[k, k]) * b[k]
    along = torch.zeros(m, dtype=x.dtype)  # g_i^T F_(i-1)^-1 x
    for i in range(m):
        along[i] = gradients[i] @ x / damping - sum(d[k, i] * along[k] / (m + d[k, k]) for k in range(i))
    return x / damping - ((along / (m + d.diagonal())) @ b) @ gradients


@pytest.mark.parametrize("damping", [1e-4, 1.0, 30.0])
def test_it_is_the_published_recursion_at_every_step_of_a_sliding_window(damping: float):
    count, length = 6, 23
    window, rows = GradientWindow(torch.zeros(length, dtype=torch.float64), count, damping), torch.zeros(count, length)
    rows, x = rows.double(), random(length, seed=1)
    for step in range(3 * count):
        gradient = random(length, seed=step + 2)
        inner = window.replace(step % count, gradient)
        rows[step % count] = gradient
        for vector in (x, gradient):
            found = window.times(vector)
            scale = float(found.abs().max())
            torch.testing.assert_close(found, recursion(rows, damping) @ vector, rtol=0, atol=1e-10 * scale)
            torch.testing.assert_close(found, dynamic(rows, damping, vector), rtol=0, atol=1e-10 * scale)
        assert torch.equal(window.times(gradient, inner), window.times(gradient))


def test_any_gradient_can_be_replaced():
    window, rows = GradientWindow(random(11), 4, 0.1), torch.zeros(4, 11, dtype=torch.float64)
    for step, place in enumerate([2, 0, 2, 3, 1, 1]):
        rows[place] = random(11, seed=step)
        window.replace(place, rows[place])
    torch.testing.assert_close(window.times(random(11, seed=9)), recursion(rows, 0.1) @ random(11, seed=9))
    torch.testing.assert_close(window.products[0], rows @ rows.T)


@pytest.mark.parametrize("size", [1, 4, 5, 11, 40])
def test_blocks_have_an_inverse_each(size: int):
    window, rows, x = GradientWindow(random(11), 3, 0.2, size), random(3, 11), random(11, seed=5)
    for place, row in enumerate(rows):
        window.replace(place, row)
    wanted = [recursion(part, 0.2) @ own for part, own in zip(rows.split(size, 1), x.split(size), strict=True)]
    torch.testing.assert_close(window.times(x), torch.cat(wanted))


def test_what_cannot_be_inverted_is_said():
    with pytest.raises(ValueError, match="positive, not 0"):
        GradientWindow(torch.zeros(3), 2, 0.0)
    window = GradientWindow(torch.zeros(3), 2, 1.0)
    window.replace(0, torch.tensor([1.0, torch.nan, 0.0]))
    with pytest.raises(ValueError, match="not finite"):
        window.times(torch.ones(3))
