import pytest
import torch
from torch.nn.functional import kl_div

from slimlm.linalg import softmax
from slimlm.linalg.softmax import MapFit


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = randn(400, 8)
    return randn(30, 8, seed=1), randn(30, seed=2), x, x @ randn(8, 5, seed=3) * torch.tensor([9, 1, 1, 1, 0.1])


def test_the_divergence_is_the_kullback_leibler_divergence(monkeypatch: pytest.MonkeyPatch):
    head, bias, x, seen = problem()
    start = randn(8, 5, seed=4)
    fit = MapFit(head, bias, start, seen.T @ seen)
    monkeypatch.setattr(softmax, "CHUNK_LOGITS", 30 * 64)
    wanted = (x @ head.T + bias).log_softmax(-1)
    got = (seen @ start.T @ head.T + bias).log_softmax(-1)
    assert fit.divergence(x, seen) == pytest.approx(
        float(kl_div(got, wanted, log_target=True, reduction="sum")), rel=1e-4
    )
    assert torch.allclose(fit.map, start, atol=1e-4)


def test_the_first_step_goes_down_autograds_gradient():
    head, bias, x, seen = problem()
    start = randn(8, 5, seed=4)
    fit = MapFit(head, bias, start, seen.T @ seen)
    point = fit.point.clone().requires_grad_()
    got = (seen @ (point @ fit.whiten.T).T @ head.T + bias).log_softmax(-1)
    kl_div(got, (x @ head.T + bias).log_softmax(-1), log_target=True, reduction="sum").div(len(x)).backward()
    before = fit.point.clone()
    fit.step(fit.add_gradient(torch.zeros_like(fit.point), x, seen), len(x), 0.0)
    moved = fit.point - before
    assert torch.equal(moved.sign(), -point.grad.sign())
    assert torch.allclose(moved.abs(), torch.full_like(moved, fit.rate), rtol=1e-2)


def test_steps_bring_the_divergence_down_to_what_a_long_optimisation_finds():
    head, bias, x, seen = problem()
    fit = MapFit(head, bias, torch.linalg.lstsq(seen, x).solution.T, seen.T @ seen)
    before = fit.divergence(x, seen)
    for index in range(300):
        fit.step(fit.add_gradient(torch.zeros_like(fit.point), x, seen), len(x), index / 300)
    point = fit.map.clone().requires_grad_()
    best = torch.optim.LBFGS([point], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        best.zero_grad()
        got = (seen @ point.T @ head.T + bias).log_softmax(-1)
        value = kl_div(got, (x @ head.T + bias).log_softmax(-1), log_target=True, reduction="sum")
        value.backward()
        return value

    best.step(loss)
    least = loss().item()
    assert fit.divergence(x, seen) < before
    assert fit.divergence(x, seen) - least < 0.05 * (before - least)
