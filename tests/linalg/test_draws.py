"""Tokens drawn from predictions, and gradients of their losses."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from slimlm.linalg.draws import IGNORED, draw, slopes_of, slopes_of_drawn


def test_draws_come_as_often_as_is_likely():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    generator, heat = torch.Generator().manual_seed(0), torch.full((20000, 1), 0.5)
    found = draw(probabilities.sqrt().log().expand(20000, 6), heat, generator).flatten()
    shares = found.bincount(minlength=6) / 20000
    assert shares[probabilities == 0].sum() == 0
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


def test_draws_are_the_generators():
    logits, heat = torch.rand(50, 9), torch.ones(50, 1)
    first, again, other = (draw(logits, heat, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (50, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slopes_are_the_gradients_of_the_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("slimlm.linalg.draws.CACHED", 4 * 11)  # rows at a time: 4 of 14
    logits = torch.randn(2, 7, 11).to(dtype).requires_grad_()
    targets = torch.randint(0, 11, (2, 7))
    targets[0, 3] = targets[1, 6] = IGNORED
    loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    found = slopes_of(logits.detach(), targets)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 1e-2)
    assert not found[targets == IGNORED].any()


def test_slopes_of_drawn_outcomes_are_those_of_the_outcomes_that_draw_gives(monkeypatch: pytest.MonkeyPatch):
    logits = torch.randn(3, 40, 11)
    outcomes = draw(logits.flatten(0, 1), torch.ones(120, 1), torch.Generator().manual_seed(4)).view(3, 40)
    monkeypatch.setattr("slimlm.linalg.draws.CACHED", 5 * 11)
    found = slopes_of_drawn(logits, torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, slopes_of(logits, outcomes), atol=1e-7, rtol=0)
    assert outcomes.unique().numel() > 3


def test_slopes_are_right_however_logits_lie_in_memory():
    logits, targets = torch.randn(7, 2, 11).transpose(0, 1), torch.randint(0, 11, (2, 7))
    assert torch.equal(slopes_of(logits, targets), slopes_of(logits.contiguous(), targets))


def test_slopes_of_drawn_outcomes_are_nothing_on_average():
    """The score function's mean: what makes their covariance the Fisher information."""
    logits = torch.randn(11).expand(40_000, 11)
    found = slopes_of_drawn(logits, torch.Generator().manual_seed(0)).mean(0)
    assert found.abs().max() < 0.01
