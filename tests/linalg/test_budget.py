import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimlm.linalg.budget import LossCurve, isotonic, predicted_loss, rise_of, spaced


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


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
