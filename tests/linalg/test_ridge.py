import math

import pytest
import torch

from slimlm.fit.ridge import ridge
from slimlm.linalg.regression import Moments, Regression, held_out
from slimlm.linalg.ridge import STRENGTHS


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data(windows: int = 20, noise: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, truth = randn(windows, 16, 6, seed=seed), randn(4, 6, seed=seed + 1)
    return x, x @ truth.T + noise * randn(windows, 16, 4, seed=seed + 2), truth


def regression(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None, size: int = 3) -> Regression:
    found, start = Regression.of(x.shape[-1], y.shape[-1]), 0
    for index in range(0, len(x), size):
        part = slice(index, index + size)
        held = held_out(len(x[part]), start)
        found.add(x[part], y[part], held, None if weight is None else weight[part])
        start += len(x[part])
    return found


def test_every_fifth_window_is_held_out_however_they_are_batched():
    assert held_out(12).nonzero().flatten().tolist() == [4, 9]
    assert torch.cat([held_out(5), held_out(7, 5)]).tolist() == held_out(12).tolist()


def test_the_fit_is_the_minimiser_written_out_for_the_strength_it_chose():
    x, y, truth = data()
    prior = truth + 0.3 * randn(4, 6, seed=9)
    found = ridge(regression(x, y), prior)
    assert found.strength in STRENGTHS
    held = held_out(len(x))
    unit = (x[~held].flatten(0, 1).double().square().sum(0)).mean()
    unit *= x.double().square().sum() / x[~held].double().square().sum()
    flat, wanted = x.flatten(0, 1).double(), y.flatten(0, 1).double()
    stacked = torch.cat([flat, (found.strength * unit).sqrt() * torch.eye(6)])
    right = torch.cat([wanted, (found.strength * unit).sqrt() * prior.double().T])
    expected = torch.linalg.lstsq(stacked, right).solution.T
    assert torch.allclose(found.weight.double(), expected, atol=1e-5)
    assert (found.weight - truth).norm() < 0.2 * (prior - truth).norm()


@pytest.mark.parametrize("seed", range(5))
def test_a_prior_that_is_right_stays_and_so_does_one_that_noise_would_only_spoil(seed: int):
    x, _, prior = data(seed=seed)
    found = ridge(regression(x, x @ prior.T), prior)
    assert torch.allclose(found.weight, prior, atol=1e-5)
    noisy = ridge(regression(x[:5, :2], (x @ prior.T)[:5, :2] + 3 * randn(5, 2, 4, seed=seed + 50)), prior)
    assert noisy.strength >= 1
    assert (noisy.weight - prior).norm() < prior.norm()


def test_a_singular_gram_is_no_obstacle():
    x = randn(20, 4, 6)
    x[..., 3] = 0
    x[..., 5] = x[..., 1]
    found = ridge(regression(x, x @ randn(4, 6, seed=1).T), randn(4, 6, seed=2))
    assert torch.isfinite(found.weight).all()
    assert math.isfinite(found.strength)


def test_a_weight_counts_a_window_so_many_times():
    x, y, _ = data(windows=10)
    weight = torch.ones(10, 16)
    weight[0] = 2
    doubled = regression(x, y, weight)
    plain, extra = regression(x, y), Moments(6, 4)
    extra.add(x[0], y[0])
    assert torch.allclose(doubled.fit.xx, plain.fit.xx + extra.xx, atol=1e-3)
    assert torch.allclose(doubled.fit.xy, plain.fit.xy + extra.xy, atol=1e-3)
    assert torch.equal(doubled.held.xx, plain.held.xx)


def test_inputs_taken_out_are_as_if_they_had_never_been():
    x, y, _ = data()
    kept = torch.tensor([0, 2, 5])
    taken, direct = regression(x, y).take(kept), regression(x[..., kept], y)
    assert torch.allclose(taken.fit.xx, direct.fit.xx, atol=1e-4)
    assert torch.allclose(taken.held.xy, direct.held.xy, atol=1e-4)


def test_a_gram_that_was_used_up_comes_back(monkeypatch):
    monkeypatch.setattr("slimlm.linalg.regression.WIDEST", 2)
    monkeypatch.setattr("slimlm.linalg.regression.ROWS", 4)
    x, y, _ = data()
    found = regression(x, y)
    before = found.fit.xx.clone()
    with pytest.raises(ValueError), found.gram() as gram:
        assert torch.equal(gram, before)
        gram.fill_(math.nan)
        raise ValueError
    assert torch.allclose(found.fit.xx, before, rtol=1e-6, atol=1e-6 * float(before.diagonal().mean()))
    assert torch.equal(found.fit.xx, found.fit.xx.T)  # what comes back is mirrored, however the sum was rounded


@pytest.mark.parametrize("windows", [20, 400])
def test_wide_inputs_are_fitted_as_well_from_a_sample_of_the_held_out_tokens(windows: int, monkeypatch):
    x, y, truth = data(windows)
    prior = truth + 0.3 * randn(4, 6, seed=9)
    metric = torch.diag(torch.tensor([1.0, 2, 3, 4]))
    narrow = ridge(regression(x, y), prior, metric)
    monkeypatch.setattr("slimlm.linalg.gram.WIDE", 2)
    monkeypatch.setattr("slimlm.linalg.regression.WIDEST", 2)
    monkeypatch.setattr("slimlm.linalg.regression.HELD_ELEMENTS", 6 * 400)
    sampled = regression(x, y)
    kept = sum(len(part) for part, _ in sampled.held.parts)
    assert kept == (64 if windows == 20 else 320)
    wide = ridge(sampled, prior, metric)
    assert (wide.weight - narrow.weight).abs().max() < (1e-4 if windows == 20 else 0.02)


def test_all_held_out_tokens_of_wide_inputs_are_in_the_fit_where_they_can_be_shown_again(monkeypatch):
    x, y, truth = data(400)
    weight = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3)) + 0.5
    held = held_out(len(x))

    def show(add):
        for part in range(0, len(x), 50):
            rows = slice(part, part + 50)
            add(x[rows], y[rows], held[rows], weight[rows])

    prior = truth + 0.3 * randn(4, 6, seed=9)
    whole = Regression.of(6, 4)
    show(whole.add)
    whole.centre(prior.T)
    wanted = whole.join()
    monkeypatch.setattr("slimlm.linalg.regression.WIDEST", 2)
    monkeypatch.setattr("slimlm.linalg.regression.HELD_ELEMENTS", 6 * 40)
    sampled = Regression.of(6, 4)
    show(sampled.add)
    sampled.again = lambda add, into: show(add)
    with sampled.gram() as gram:
        assert torch.allclose(gram, wanted.xx, rtol=1e-6, atol=1e-2)  # of 6,000 on the diagonal
    sampled.centre(prior.T)
    found = sampled.join()
    assert torch.allclose(found.xx, wanted.xx, rtol=1e-6, atol=1e-2)
    assert torch.allclose(found.xy, wanted.xy, rtol=1e-5, atol=1e-5)


def test_errors_count_in_the_metric_they_are_given():
    x, y, truth = data(windows=30, noise=3.0)
    prior = truth.clone()
    prior[0] += 5  # only output 0 is wrong; the others would rather be left alone
    blind = torch.eye(4)
    blind[0, 0] = 0
    assert ridge(regression(x, y), prior).strength < ridge(regression(x, y), prior, blind).strength


def test_a_metric_that_rounding_made_indefinite_or_infinite_is_no_error():
    x, y, truth = data()
    for broken in (-torch.eye(4), torch.full((4, 4), math.inf)):
        fit = ridge(regression(x, y), truth, broken)
        assert torch.isfinite(fit.weight).all()
    assert math.isinf(fit.strength)  # held-out errors are no numbers, and the prior stays
    assert torch.equal(fit.weight, truth)
