"""Second-order pruning of one matrix, against slow loops written from the papers."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlm.linalg.fisher import token_inverse
from slimlm.linalg.hessian import Hessian, SingularCurvature, quadratic_loss, with_gradients
from slimlm.linalg.hessian import hessian as hessian_in_place
from slimlm.linalg.masks import Tile, pooled, smallest, smallest_per_group, spread_out
from slimlm.linalg.obs import Solved, cheapest_first, greedy_order, joint, left_to_right, summed
from slimlm.prune import updates
from slimlm.prune.quota import Quota


def problem(outputs: int = 6, inputs: int = 16, tokens: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [outputs, inputs] and the Gram of correlated inputs, fp64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    return torch.randn(outputs, inputs, dtype=torch.float64, generator=generator), x.T @ x


def hessian(gram: torch.Tensor, damping: float = 0.01) -> Hessian:
    return hessian_in_place(gram.clone(), damping)


def damped(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def without(weight: torch.Tensor, matrix: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """Per row, the constrained minimiser by Lagrange multipliers: W - (W E)(E^T H^-1 E)^-1 E^T H^-1."""
    inverse, result = torch.linalg.inv(matrix), weight.clone()
    for row, gone in enumerate(pruned):
        if gone.any():
            multipliers = torch.linalg.inv(inverse[gone][:, gone]) @ weight[row, gone]
            result[row] -= multipliers @ inverse[gone]
    return result


def sparsegpt_as_printed(weight: torch.Tensor, matrix: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Columns in order; after each, the inverse Hessian of those still to come, computed anew."""
    weight = weight.clone()
    for column in range(weight.shape[1]):
        left = torch.linalg.inv(matrix[column:, column:])
        error = weight[:, column] * masks[:, column] / left[0, 0]
        weight[:, column:] -= error[:, None] * left[0]
    return weight.masked_fill(masks, 0)


def test_the_hessian_is_damped_and_its_inverse_and_factor_are_those_of_the_dense_matrix():
    _, gram = problem()
    found = hessian(gram, 0.03)
    assert torch.allclose(found.matrix, damped(gram, 0.03), rtol=1e-12)
    assert torch.allclose(found.inverse @ found.matrix, torch.eye(16, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(found.upper.T @ found.upper, found.inverse, atol=1e-12)
    assert torch.equal(found.upper, found.upper.triu())
    assert found.damping == 0.03
    assert not found.dead.any()


def test_a_singular_gram_gets_the_damping_it_needs_and_a_hopeless_one_is_refused():
    _, gram = problem(tokens=3)
    assert hessian(gram).damping == 0.01
    indefinite = gram - 0.05 * gram.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    assert hessian(indefinite).damping == pytest.approx(0.1)
    for bad in (gram * float("nan"), -gram.diagonal().mean() * 1000 * torch.ones(16, 16).double() + gram):
        bad.diagonal().clamp_(min=1.0)
        with pytest.raises(SingularCurvature, match="even with 100 of damping"):
            hessian(bad)


def test_dead_inputs_are_left_out_of_everything():
    weight, gram = problem()
    gram[3] = gram[:, 3] = 0
    found = hessian(gram)
    assert found.dead.nonzero().flatten().tolist() == [3]
    others = [i for i in range(16) if i != 3]
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    pruned[:, ::4] = True
    solution = joint(weight, found, pruned, tolerance=1e-13).found
    assert not solution[:, 3].any()
    expected = without(weight[:, others], found.matrix[others][:, others], pruned[:, others])
    assert torch.allclose(solution[:, others], expected, atol=1e-10)


@pytest.mark.parametrize("width", [4, 5, 16, 128])
def test_left_to_right_is_sparsegpt_as_printed(width: int):
    weight, gram = problem()
    found, pruned = left_to_right(
        weight, hessian(gram), lambda scores, start: smallest(scores, scores.numel() // 2), width
    )
    assert torch.allclose(found, sparsegpt_as_printed(weight, damped(gram), pruned), atol=1e-10)
    assert int(pruned.sum()) == sum(6 * min(width, 16 - start) // 2 for start in range(0, 16, width))


def test_left_to_right_chooses_by_the_scores_of_the_paper():
    weight, gram = problem()
    seen = []

    def choose(scores: torch.Tensor, start: int) -> torch.Tensor:
        seen.append((start, scores.clone()))
        return smallest_per_group(scores, 2, 4)

    _, pruned = left_to_right(weight, hessian(gram), choose, 4)
    current, matrix = weight.clone(), damped(gram)
    for start, scores in seen:
        expected = torch.stack(
            [current[:, c].square() / torch.linalg.inv(matrix[c:, c:])[0, 0] for c in range(start, start + 4)], dim=1
        )
        assert torch.allclose(scores, expected, rtol=1e-8)
        for column in range(start, start + 4):
            left = torch.linalg.inv(matrix[column:, column:])
            current[:, column:] -= (current[:, column] * pruned[:, column] / left[0, 0])[:, None] * left[0]


def test_greedy_is_obc_written_as_a_loop_and_its_costs_add_up():
    weight, gram = problem()
    matrix = damped(gram)
    order, cost = greedy_order(weight, hessian(gram), 9)
    for row in range(len(weight)):
        current, inverse, gone = weight[row].clone(), torch.linalg.inv(matrix), []
        for step in range(9):
            left = [c for c in range(16) if c not in gone]
            column = min(left, key=lambda c: float(current[c] ** 2 / inverse[c, c]))
            assert int(order[row, step]) == column
            assert float(cost[row, step]) == pytest.approx(float(current[column] ** 2 / inverse[column, column] / 2))
            current = current - inverse[column] * current[column] / inverse[column, column]
            inverse = inverse - torch.outer(inverse[column], inverse[column]) / inverse[column, column]
            gone.append(column)
        pruned = torch.zeros(1, 16, dtype=torch.bool)
        pruned[0, gone] = True
        best = without(weight[row : row + 1], matrix, pruned)
        assert float(quadratic_loss(best - weight[row], hessian(gram))) / 2 == pytest.approx(float(cost[row].sum()))
        assert torch.allclose(current[left], best[0, left], atol=1e-10)


def test_one_weight_obs_is_the_constrained_minimiser():
    weight, gram = problem()
    curvature = hessian(gram)
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    pruned[torch.arange(6), torch.tensor([0, 3, 5, 8, 15, 2])] = True
    expected = without(weight, curvature.matrix, pruned)
    assert torch.allclose(summed(weight, curvature, pruned), expected, atol=1e-10)
    assert torch.allclose(joint(weight, curvature, pruned, tolerance=1e-13).found, expected, atol=1e-10)


def test_summed_takes_an_inverse_for_each_row():
    weight, _ = problem()
    x, delta = problem(30, 16, seed=3)[0], problem(30, 6, seed=4)[0]
    found = token_inverse(x, delta, 0.1)
    pruned = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)) < 0.4
    result = summed(weight, found, pruned)
    for row, inverse in enumerate(found.matrix()):
        expected = weight[row].clone()
        for column in pruned[row].nonzero().flatten().tolist():
            expected -= inverse[column] * weight[row, column] / inverse[column, column]
        assert torch.allclose(result[row], expected.masked_fill(pruned[row], 0), atol=1e-10)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95), st.sampled_from([3, 12, 40, 400]))
def test_a_joint_update_is_exact_and_never_worse_than_any_other_on_the_same_mask(seed: int, share: float, tokens: int):
    weight, gram = problem(tokens=tokens, seed=seed)
    curvature = hessian(gram)
    before = weight.clone()
    update, pruned = left_to_right(
        weight, curvature, lambda scores, start: smallest(scores, round(share * scores.numel())), 16
    )
    found = joint(weight, curvature, pruned, update, 1e-13).found
    assert torch.allclose(found, without(weight, curvature.matrix, pruned).masked_fill(pruned, 0), atol=1e-8)
    loss = quadratic_loss(found - weight, curvature)
    for other in (update, summed(weight, curvature, pruned), weight.masked_fill(pruned, 0)):
        assert (loss <= quadratic_loss(other - weight, curvature) * (1 + 1e-9) + 1e-9).all()
    assert torch.equal(weight, before)
    assert not found[pruned].any()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([3e-1, 2e-2, 1e-4]), st.sampled_from([torch.float32, torch.float64]))
def test_a_joint_update_ends_by_what_its_rows_lose(seed: int, tolerance: float, dtype: torch.dtype):
    """Gradient and loss, carried along with it, are those at its end."""
    weight, gram = problem(seed=seed)
    exact, pruned = hessian(gram), smallest(weight.abs(), 60)
    found = joint(weight.to(dtype), exact.to(dtype), pruned, tolerance=tolerance)
    best = quadratic_loss(joint(weight, exact, pruned, tolerance=1e-13).found - weight, exact)
    rounding = 1e4 * torch.finfo(dtype).eps
    lost = quadratic_loss(found.found.double() - weight, exact)
    assert (lost <= best * (1 + 20 * tolerance**2 + rounding)).all()
    assert torch.allclose(found.loss.double(), lost, rtol=rounding)
    assert torch.allclose(found.gradient.double(), exact.apply(weight - found.found), rtol=0, atol=rounding * 100)


def test_a_good_start_saves_iterations(monkeypatch: pytest.MonkeyPatch):
    weight, gram = problem()
    curvature, pruned = hessian(gram), smallest(weight.abs(), 48)
    near = joint(weight, curvature, pruned, tolerance=1e-3).found
    calls: list[torch.Tensor] = []
    monkeypatch.setattr(Hessian, "apply", lambda self, change: calls.append(change) or change @ self.matrix)
    joint(weight, curvature, pruned, near, 1e-2)
    assert len(calls) == 1
    joint(weight, curvature, pruned, None, 1e-2)
    assert len(calls) > 4


@pytest.mark.parametrize(("group", "width"), [(2, 8), (4, 16), (4, 128), (8, 16)])
def test_masks_of_groups_are_chosen_within_a_block_as_if_each_was_one(group: int, width: int):
    weight, gram = problem()
    one, other = (
        left_to_right(weight, hessian(gram), lambda scores, _: smallest_per_group(scores, group // 2, group), *sizes)
        for sizes in ((group,), (width, group))
    )
    assert torch.equal(one[1], other[1])
    assert torch.allclose(one[0], other[0], atol=1e-12)


def swapped(
    weight: torch.Tensor,
    curvature: Hessian,
    pruned: torch.Tensor,
    solved: Solved,
    group: int = 0,
    tile: Tile = (1, 1),
    rounds: int = 1,
) -> tuple[Solved, torch.Tensor]:
    kept = Solved(*(one.clone() for one in vars(solved).values()))
    quota = Quota((len(weight),), (0,), group=group, tile=tile)
    return updates.swapped(weight, curvature, (kept, pruned), quota, rounds)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([0, 4, 8]))
def test_swaps_keep_every_count_and_never_lose(seed: int, group: int):
    weight, gram = problem(seed=seed)
    curvature = hessian(gram)
    scores = weight.abs()
    pruned = smallest_per_group(scores, group // 2, group) if group else smallest(scores, 50)
    found = joint(weight, curvature, pruned)
    better, mask = swapped(weight, curvature, pruned, found, group)
    assert torch.equal(mask.sum(1), pruned.sum(1))
    if group:
        assert (mask.view(-1, group).sum(1) == group // 2).all()
    assert not better.found[mask].any()
    now, was = (quadratic_loss(one.found - weight, curvature) for one in (better, found))
    assert (now <= was).all()


@pytest.mark.parametrize("group", [0, 4])
def test_a_row_does_not_hang_on_the_others(group: int):
    """Rows that are easily solved among some that are not, and such as no swap helps among those that go on."""
    weight, gram = problem(outputs=24)
    weight[::2] *= 1e-3
    pruned = smallest_per_group(-weight.abs(), 2, 4)
    pruned[::3] = smallest_per_group(weight[::3].abs(), 2, 4)
    curvature = hessian(gram)
    together = joint(weight, curvature, pruned)
    apart = [joint(weight[row : row + 1], curvature, pruned[row : row + 1]) for row in range(24)]
    for name, found in vars(together).items():
        assert torch.allclose(found, torch.cat([getattr(one, name) for one in apart]), rtol=1e-9, atol=1e-12)
    masks = [pruned]
    for _ in range(4):
        alone = [swapped(weight[[row]], curvature, masks[-1][[row]], one, group) for row, one in enumerate(apart)]
        apart = [one for one, _ in alone]
        masks.append(torch.cat([mask for _, mask in alone]))
    found, mask = swapped(weight, curvature, pruned, together, group, rounds=4)
    assert torch.equal(mask, masks[-1])
    assert torch.allclose(found.found, torch.cat([one.found for one in apart]), rtol=1e-9, atol=1e-12)
    going = [int((one != other).any(1).sum()) for one, other in pairwise(masks)]
    assert going[0] > going[-1]


def test_rows_that_leave_one_after_another_keep_what_they_had():
    weight, gram = problem(outputs=64, inputs=48, tokens=60)
    pruned = (
        torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < torch.linspace(0.05, 0.9, 64)[:, None]
    )
    curvature = hessian(gram)
    together = joint(weight, curvature, pruned, tolerance=1e-6)
    for row in range(64):
        alone = joint(weight[[row]], curvature, pruned[[row]], tolerance=1e-6)
        assert torch.allclose(together.found[row], alone.found[0], rtol=1e-5, atol=1e-5)


def test_swaps_of_tiles_keep_them_whole_and_no_row_of_them_gets_worse():
    weight, gram = problem(outputs=12)
    curvature, tile = hessian(gram), (3, 4)
    mask = spread_out(smallest(-pooled(weight.square(), tile), 8), tile)
    found = joint(weight, curvature, mask)
    for _ in range(3):
        better, swap = swapped(weight, curvature, mask, found, tile=tile)
        assert torch.equal(swap, spread_out(swap[::3, ::4], tile))
        assert torch.equal(swap.sum(1), mask.sum(1))
        assert not better.found[swap].any()
        was, now = (quadratic_loss(one.found - weight, curvature).view(-1, 3).sum(1) for one in (found, better))
        assert (now <= was).all()
        found, mask = better, swap
    first = joint(weight, curvature, spread_out(smallest(-pooled(weight.square(), tile), 8), tile)).found
    lost = [float(quadratic_loss(one - weight, curvature).sum()) for one in (found.found, first)]
    assert lost[0] < 0.8 * lost[1]


def test_swaps_find_what_a_poor_mask_missed():
    weight, gram = problem(outputs=64)
    curvature = hessian(gram)
    poor = smallest_per_group(-weight.abs(), 8, 16)
    found, mask = joint(weight, curvature, poor), poor
    losses = [float(quadratic_loss(found.found - weight, curvature).sum())]
    for _ in range(12):
        found, mask = swapped(weight, curvature, mask, found)
        losses.append(float(quadratic_loss(found.found - weight, curvature).sum()))
    greedy = torch.zeros_like(mask).scatter_(1, greedy_order(weight, curvature, 8)[0], True)
    best = float(quadratic_loss(joint(weight, curvature, greedy).found - weight, curvature).sum())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] < 2 * best


def test_rows_compete_for_how_many_go_by_what_the_next_one_costs():
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    cost = torch.tensor([[1.0, 5.0, 2.0], [3.0, 4.0, 9.0]])  # a later weight can be cheaper than one before it
    assert cheapest_first(order, cost, 3, 3).tolist() == [[False, False, True], [False, True, True]]
    assert cheapest_first(order, cost, 5, 3).tolist() == [[True, True, True], [False, True, True]]
    assert int(cheapest_first(order, cost, 0, 3).sum()) == 0


def test_greedy_keeps_to_a_pattern():
    weight, gram = problem()
    order, _ = greedy_order(weight, hessian(gram), 8, group=4, most=2)
    pruned = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)
    assert (pruned.view(-1, 4).sum(1) == 2).all()


def test_gradients_beside_the_gram_are_a_curvature_for_every_row():
    weight, gram = problem()
    x, delta = problem(30, 16, seed=3)[0], problem(30, 6, seed=4)[0]
    curvature = with_gradients(hessian(gram), x, delta, share=0.5)
    pruned = smallest(weight.abs(), 48)
    found = joint(weight, curvature, pruned, tolerance=1e-13).found
    for row in range(6):
        own = (delta[:, row, None] * x).T @ (delta[:, row, None] * x)
        matrix = damped(gram) + own / own.trace() * damped(gram).trace()
        expected = without(weight[row : row + 1], matrix, pruned[row : row + 1]).masked_fill(pruned[row], 0)
        assert torch.allclose(found[row], expected[0], atol=1e-9)
        assert torch.allclose(curvature.apply(weight)[row], weight[row] @ matrix, atol=1e-8)


def test_rows_that_are_not_solved_to_the_end_are_said(monkeypatch, caplog):
    weight, gram = problem()
    curvature = hessian(gram)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    whole = joint(weight, curvature, pruned, tolerance=1e-5)
    assert not caplog.records
    monkeypatch.setattr("slimlm.linalg.obs.ITERATIONS", 1)
    short = joint(weight, curvature, pruned, tolerance=1e-5)
    (record,) = caplog.records
    count, of, reached, wanted, after = record.args
    assert (of, wanted, after) == (6, 1e-5, 1)
    assert 0 < count <= 6
    assert wanted < reached < 1
    lost = [quadratic_loss(one.found - weight, curvature).sum() for one in (whole, short)]
    assert lost[0] < lost[1]
