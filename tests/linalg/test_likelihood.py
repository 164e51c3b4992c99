"""Divergences of next-token distributions, and their gradients, against formulas written out."""

import pytest
import torch
from torch import Tensor

from slimlm.linalg import likelihood
from slimlm.linalg.likelihood import Likeliest, divergence


def drawn(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written_out(logits: Tensor, wanted: Tensor) -> Tensor:
    return (wanted.softmax(-1) * (wanted.log_softmax(-1) - logits.log_softmax(-1))).sum()


@pytest.fixture(params=[1, 120, 1 << 20], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CACHED", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_divergence_and_its_gradient(dtype: torch.dtype):
    logits, wanted = drawn(2, 5, 50, seed=0).to(dtype).requires_grad_(), drawn(2, 5, 50, seed=1).to(dtype)
    found, expected = divergence(logits, wanted), written_out(logits.float(), wanted.float())
    torch.testing.assert_close(found, expected)
    (own,), (other,) = (torch.autograd.grad(0.5 * one, logits) for one in (found, expected))
    assert own.dtype == dtype
    torch.testing.assert_close(own.float(), other.float(), rtol=0.01 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_what_is_not_among_the_likeliest_counts_as_one_outcome():
    logits, wanted = drawn(2, 5, 50, seed=0).requires_grad_(), drawn(2, 5, 50, seed=1)
    few = Likeliest.of(wanted, 8)
    p = few.logs.float().exp()
    q = logits.softmax(-1).gather(-1, few.tokens.long())
    p, q = (torch.cat([one, 1 - one.sum(-1, keepdim=True)], -1) for one in (p, q))
    expected = (p * (p / q).log()).sum()
    found = divergence(logits, few)
    torch.testing.assert_close(found, expected)
    assert found.item() < written_out(logits, wanted).item()
    (own,), (other,) = (torch.autograd.grad(one, logits) for one in (found, expected))
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_the_likeliest_of_a_certain_prediction_leave_nothing():
    wanted = torch.zeros(1, 6)
    wanted[0, 2] = 100.0
    logits = torch.zeros(1, 6, requires_grad=True)
    found = divergence(logits, Likeliest.of(wanted, 2))
    torch.testing.assert_close(found, torch.tensor(6.0).log(), rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, torch.full((1, 6), 1 / 6) - wanted / 100, rtol=1e-2, atol=1e-4)


def test_a_student_that_is_certain_is_told_how_much_it_leaves_out():
    logits = torch.tensor([[16.0, 0.0, -1.0, 0.5]], requires_grad=True)
    few = Likeliest(torch.tensor([[0]], dtype=torch.int32), torch.tensor([[0.96]]).log())
    found = divergence(logits, few)
    logs = logits.log_softmax(-1)[0]
    rest = logs[1:].logsumexp(0)
    expected = 0.96 * (torch.tensor(0.96).log() - logs[0]) + 0.04 * (torch.tensor(0.04).log() - rest)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (own,), (other,) = (torch.autograd.grad(one, logits) for one in (found, expected))
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
