"""Masks that are a formula: against it."""

import pytest
import torch
from torch import Tensor

from slimlm.errors import UserError
from slimlm.methods import METHODS, pruning
from slimlm.prune import masks, updates
from slimlm.prune.curvature import CURVATURES, Flat, able, row_fisher
from slimlm.prune.group import Row, code_hash, name_of, prune
from slimlm.prune.quota import Quota
from slimlm.recipe import PruneStep, one_step
from slimlm.statistics.token_gradients import TokenGradients


def gradients(window: int) -> TokenGradients:
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(24, size, generator=generator).double() for size in (6, 4))
    return TokenGradients(x, delta, window)


@pytest.mark.parametrize("window", [1, 4])
def test_weight_times_gradient_is_that_of_every_gradient_by_itself(window: int):
    found = gradients(window)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    outer = found.delta[:, :, None] * found.x[:, None, :]
    each = outer.view(-1, window, 4, 6).sum(1)
    scores = (each * weight).square().mean(0)
    left, pruned = prune(weight, row_fisher(found, 0.1, False), Quota((4,), (9,)), METHODS["taylor"].row)
    assert pruned.sum() == 9
    assert scores[pruned].max() <= scores[~pruned].min()
    assert torch.equal(left, weight.masked_fill(pruned, 0))


def random_mask(seed: int) -> Tensor:
    weight = torch.ones(8, 16)
    return masks.random(weight, Flat(), Quota((4, 4), (10, 30), seed=seed))[1]


def test_a_random_mask_is_its_seeds():
    assert [int(part.sum()) for part in random_mask(0).split(4)] == [10, 30]
    assert torch.equal(random_mask(0), random_mask(0))
    assert not torch.equal(random_mask(0), random_mask(1))


def test_what_a_mask_and_an_update_need_is_what_they_use():
    """Every curvature that is said to do gives a result, on a matrix with all that can be known of it."""
    assert able(masks.magnitude) == list(CURVATURES)
    assert able(masks.wanda) == ["diagonal", "gram", "gram+fisher"]
    assert able(masks.taylor) == ["fisher", "block-fisher"]
    assert able(updates.joint) == ["gram", "gram+fisher"]
    assert able(updates.summed) == ["gram", "gram+fisher", "fisher", "block-fisher"]


def test_the_table_of_methods_and_what_recipes_say_of_it_agree():
    for method in METHODS.values():
        assert method.steps.model_fields
        if method.row is not None:
            step = PruneStep(model="x", method=method.name, sparsity=0.5)
            row = method.row
            said = (step.curvature, step.mask, step.update, step.swaps)
            assert said == (row.curvature, name_of(row.mask), name_of(row.update), row.swaps)
            assert method.steps is PruneStep


def test_a_random_mask_does_not_depend_on_what_is_pruned_together(monkeypatch: pytest.MonkeyPatch):
    weight, quota = torch.ones(8, 16), Quota((4, 4), (10, 30), seed=5)
    together = prune(weight, Flat(), quota, METHODS["random"].row)[1]
    monkeypatch.setattr(updates, "CHUNK_ELEMENTS", 1)
    apart = prune(weight, Flat(), quota, METHODS["random"].row)[1]
    assert torch.equal(together, apart)
    assert not torch.equal(*prune(weight, Flat(), Quota((4, 4), (20, 20)), METHODS["random"].row)[1].split(4))


def test_a_method_of_ones_own_needs_a_name_of_its_own_and_its_code_is_known():
    def mine(weight: Tensor, curvature: masks.HasNorms, quota: Quota) -> masks.Chosen:
        return weight, quota.smallest(-weight)

    own = pruning("wanda", "mine", "https://example.org", Row("diagonal", mine, updates.none))
    with pytest.raises(UserError, match="there is a method 'wanda'"):
        one_step(model="x", method=own, sparsity=0.5)
    assert code_hash(own.row) != code_hash(METHODS["wanda"].row)


def test_what_a_mask_of_ones_own_needs_is_said_where_no_curvature_has_it():
    class Nobody:
        pass

    def mine(weight: Tensor, curvature: Nobody, quota: Quota) -> masks.Chosen:
        return weight, quota.smallest(weight)

    with pytest.raises(UserError, match="annotate its argument `curvature`"):
        Row("gram", mine, updates.none).check()
