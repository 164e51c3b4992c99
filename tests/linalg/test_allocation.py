import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlm.linalg.allocation import (
    alpha_shares,
    exact_counts,
    global_counts,
    hill_alpha,
    histogram,
    outlier_ratio,
    owl_shares,
    pq_index,
    pq_kept,
    pq_share,
    spectrum,
)
from slimlm.linalg.budget import LossCurve, cheapest_split


def test_the_pq_index_is_none_for_equal_weights_and_whole_for_a_single_one():
    assert pq_index(torch.ones(4, 5)) == pytest.approx(0)
    assert pq_kept(0.0) == 1
    single = torch.zeros(10)
    single[3] = -2.0
    assert pq_index(single) == 0
    assert pq_index(single, with_zeros=True) == pytest.approx(1 - 10 ** (1 - 2) * 1)
    assert pq_index(torch.zeros(3, 3)) == 0
    weight = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    size = [abs(float(w)) for w in weight.flatten()]
    by_hand = 1 - 42 ** (1 - 2) * sum(math.sqrt(w) for w in size) ** 2 / sum(size)
    assert pq_index(weight) == pytest.approx(by_hand)
    assert pq_index(1000 * weight) == pytest.approx(by_hand)


def test_what_was_pruned_has_no_say_in_the_pq_index():
    weight = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    pruned = weight.masked_fill(weight.abs() < weight.abs().median(), 0)
    assert pq_index(pruned) == pytest.approx(0.03, abs=0.005)
    assert pq_index(pruned, with_zeros=True) == pytest.approx(0.52, abs=0.01)
    assert pq_share(pruned) == pytest.approx(0.5 * (1 - pq_index(pruned)), rel=1e-3)
    assert pq_share(weight) == pytest.approx(1 - pq_index(weight))


def test_hills_estimate_is_that_of_the_tail():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 30, generator=generator)
    energies = sorted((float(s) ** 2 for s in torch.linalg.svdvals(matrix.double())), reverse=True)
    tail = sum(math.log(value / energies[15]) for value in energies[:15])
    assert hill_alpha(matrix) == pytest.approx(1 + 15 / tail)
    heavy = torch.diag(torch.arange(1.0, 31) ** -3)
    assert hill_alpha(heavy) < hill_alpha(matrix)
    assert math.isfinite(hill_alpha(torch.zeros(4, 4)))
    assert math.isfinite(hill_alpha(torch.ones(1, 1)))


def test_blocks_with_outliers_and_heavy_tails_are_pruned_less():
    scores = torch.ones(100)
    scores[:3] = 50
    assert outlier_ratio(scores) == pytest.approx(0.03)
    shares = owl_shares([0.01, 0.03, 0.02], 0.5)
    assert shares == pytest.approx([0.58, 0.42, 0.5])
    assert alpha_shares([2.0, 4.0, 3.0], 0.5) == pytest.approx([0.35, 0.65, 0.5])
    assert owl_shares([0.1, 0.1], 0.5) == pytest.approx([0.5, 0.5])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(100, 5000), st.floats(-0.3, 1.4)), min_size=1, max_size=6),
    st.floats(0, 0.98),
)
def test_counts_are_exact_whatever_was_proposed(matrices: list[tuple[int, float]], sparsity: float):
    sizes = {str(place): size for place, (size, _) in enumerate(matrices)}
    total = round(sparsity * sum(sizes.values()))
    counts = exact_counts(sizes, lambda name, c: matrices[int(name)][1] + c, total, -3.0, 3.0)
    assert sum(counts.values()) == total
    assert all(0 <= counts[name] <= sizes[name] for name in sizes)


def test_too_much_is_refused():
    with pytest.raises(ValueError, match="cannot prune 100 of 100 weights"):
        exact_counts({"a": 100}, lambda name, c: c, 100, 0, 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.floats(0, 1), st.booleans())
def test_global_counts_are_those_of_one_sorted_list(seed: int, sparsity: float, ties: bool):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(size, generator=generator) * scale for name, size, scale in
              (("a", 300, 1.0), ("b", 200, 5.0), ("c", 50, 1e-3))}  # fmt: skip
    if ties:
        scores = {name: value.mul(4).round() for name, value in scores.items()}
    total = round(sparsity * 550)
    most = {"a": 297, "b": 198, "c": 49}
    if total > sum(most.values()):
        with pytest.raises(ValueError, match="cannot prune"):
            global_counts({name: histogram(value) for name, value in scores.items()}, total)
        return
    counts = global_counts({name: histogram(value) for name, value in scores.items()}, total)
    assert sum(counts.values()) == total
    assert all(counts[name] <= most[name] for name in most)
    if any(counts[name] == most[name] for name in most):
        return  # the others give what these do not
    threshold = torch.cat(list(scores.values())).sort().values[max(0, total - 1)]
    for name, value in scores.items():
        low, high = int((value < threshold * (1 - 1 / 64)).sum()), int((value <= threshold * (1 + 1 / 64)).sum())
        assert low <= counts[name] <= high or total == 0


def test_no_matrix_goes_whole_for_what_its_scores_say():
    scores = {"small": torch.full((1000,), 1e-9), "large": torch.linspace(1, 2, 1000)}
    counts = global_counts({name: histogram(value) for name, value in scores.items()}, 1000)
    assert counts == {"small": 990, "large": 10}


@pytest.mark.parametrize("least", [0.02, 1e-6])
def test_figures_of_any_spread_decide_the_counts(least: float):
    """`pq` at so small a total: all of it comes from the matrix whose index says that most can go."""
    kept = {"a": least, "b": 1.0}
    counts = exact_counts({"a": 1000, "b": 1000}, lambda name, c: 1 - (1 - c) * kept[name], 100, 1 - 1 / least, 1.0)
    assert counts == {"a": 100, "b": 0}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(1e-3, 1), st.floats(1.1, 6), st.integers(1, 3)), min_size=2, max_size=3))
def test_the_cheapest_split_is_the_one_that_trying_all_finds(parts: list[tuple[float, float, int]]):
    curves = [LossCurve([(5, loss), (12, loss * rise)]) for loss, rise, _ in parts]
    sizes = [size for _, _, size in parts]
    found = cheapest_split(curves, sizes, 6, 12)
    unit = sum(sizes) / len(sizes)
    taken = lambda split: sum(round(count * size / unit) for count, size in zip(split, sizes, strict=True))  # noqa: E731
    loss = lambda split: sum(curve(count) for curve, count in zip(curves, split, strict=True))  # noqa: E731
    assert taken(found) == 6 * len(parts)
    every = [split for split in itertools.product(range(13), repeat=len(parts)) if taken(split) == 6 * len(parts)]
    assert loss(found) == pytest.approx(min(map(loss, every)))


def test_a_split_that_no_part_has_room_for_is_refused():
    with pytest.raises(ValueError, match="no part may lose more than 12%"):
        cheapest_split([LossCurve([(5, 0.1), (12, 0.2)])] * 2, [1, 1], 13, 12)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_a_spectrum_is_the_squared_singular_values(shape: tuple[int, int]):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[:2] = weight[2:3]  # two of rank less
    wanted = torch.linalg.svdvals(weight.double()).square()
    assert torch.allclose(spectrum(weight), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("percent", [94, 95])
def test_all_that_may_go_goes_from_parts_of_any_size(percent: int):
    curves = [LossCurve([(50, 0.1 * size), (95, float(size))]) for size in (3, 4, 5)]
    split = cheapest_split(curves, [3, 4, 5], percent, 95)
    assert sum(size * count for size, count in zip([3, 4, 5], split, strict=True)) / 12 == pytest.approx(
        percent, abs=0.7
    )
