"""Splits for a latency: what each is predicted to take, and which of them are near it, with times that are made up."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from slimlm.errors import UserError
from slimlm.evaluation.speed.shape_times import product_shapes
from slimlm.model.shape_times import Shape, StepTimes
from slimlm.model.streamed import StreamedModel
from slimlm.recipe import SliceStep
from slimlm.slice.candidates import SLACK, fast_enough
from slimlm.slice.decoding import Decoding, products_to_time
from slimlm.slice.plan import plan_slice, time_decoding
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout, Widths
from tests.conftest import CONFIGS, SIZES, build_tiny, random_tokens, stream
from tests.families.configs import SETTINGS, family_config

CONSTANT = 7e-6
WIDE = LlamaConfig(**{**SIZES, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "head_dim": 32})
OWN = [name for name in SETTINGS if "moe" not in name and "mixtral" not in name]


def seconds_of(shape: Shape) -> float:
    """Of a product: linear in its outputs and in its inputs, so that what lies between is exact."""
    out, inner = shape
    return 1e-6 + 1e-8 * out + 2e-8 * inner + 3e-10 * out * inner


def timed(model: StreamedModel) -> Shapes:
    """The shapes of a model whose times are made up."""
    shapes = Shapes(Layout(model))
    products = {shape: seconds_of(shape) for shape in products_to_time(shapes)}
    model.times = StepTimes(step_by_hand(shapes, shapes.dense), len(model.blocks), products)
    return shapes


def step_by_hand(shapes: Shapes, widths: Widths) -> float:
    """From the tensors that a Llama of these widths has."""
    total = len(widths.blocks) * CONSTANT + seconds_of((4096, widths.hidden))
    for name, shape in shapes.of(widths).items():
        if name.endswith("_proj.weight"):
            total += seconds_of((shape[0], shape[1]))
    return total


@pytest.fixture
def wide(tmp_path: Path) -> StreamedModel:
    return stream(build_tiny(WIDE, tmp_path / "wide"))


def all_splits(shapes: Shapes, granule: int) -> list[Widths]:
    """Every width in multiples of it, and of the rest whatever there is."""
    dense, layout = shapes.dense, shapes.layout
    hidden, mlp = ([*range(granule, dense.of(name) + 1, granule)] for name in ("hidden", "mlp"))
    every = itertools.product(hidden, mlp, range(1, dense.groups + 1), range(1, len(dense.blocks) + 1))
    return [
        Widths(h, m, g, tuple(range(depth)))
        for h, m, g, depth in every
        if (g == dense.groups or layout.attention(g) % granule == 0) and h % layout.divisor(g) == 0
    ]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biased", "mistral"])
def test_a_prediction_is_every_product_and_a_constant_a_block(tmp_path: Path, name: str):
    shapes = timed(stream(build_tiny(CONFIGS[name], tmp_path / name)))
    decoding, splits = Decoding(shapes), all_splits(shapes, 8)
    assert len(splits) > 100
    assert decoding.each(splits).tolist() == pytest.approx([step_by_hand(shapes, split) for split in splits])
    assert decoding.of(replace(splits[-1], blocks=(0, 2))) == pytest.approx(
        step_by_hand(shapes, replace(splits[-1], blocks=(0, 2)))
    )
    across = decoding.across(2, [(8, 1), (32, 2)], [8, 48])
    expected = [[decoding.of(Widths(h, m, g, (0, 1))) for m in (8, 48)] for h, g in ((8, 1), (32, 2))]
    assert across.tolist() == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize("name", OWN)
def test_the_products_of_a_family_are_those_that_its_own_class_multiplies_with(tmp_path: Path, name: str):
    path = build_tiny(family_config(name), tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(path).eval()
    made = product_shapes(stock, random_tokens(1, 5))
    if name == "opt post-norm":  # what is around the blocks is not counted, but for the head
        made -= {(32, 16): 1, (16, 32): 1}
    assert +products_to_time(Shapes(Layout(stream(path)))) == made


def test_more_of_a_width_never_takes_less(wide: StreamedModel):
    shapes = timed(wide)
    assert wide.times is not None
    noisy = {shape: seconds * (1 + 0.5 * math.sin(sum(shape))) for shape, seconds in wide.times.products.items()}
    wide.times = replace(wide.times, products=noisy)
    decoding, dense = Decoding(shapes), shapes.dense
    for name in ("hidden", "mlp", "groups"):
        found = decoding.each([replace(dense, **{name: width}) for width in range(1, dense.of(name) + 1)])
        assert (found.diff() >= -1e-15).all(), name


@pytest.mark.parametrize("round_to", [None, 16])
@pytest.mark.parametrize("latency", [0.9, 0.6, 0.3])
def test_splits_meet_the_latency_and_none_that_is_near_it_is_missed(
    wide: StreamedModel, latency: float, round_to: int | None
):
    shapes = timed(wide)
    found = fast_enough(shapes, SliceStep(model="x", latency=latency, round_to=round_to))
    dense = step_by_hand(shapes, shapes.dense)
    ratios = {split: step_by_hand(shapes, split) / dense for split in found}
    assert len(found) == len(set(found)) > 1
    assert max(ratios.values()) <= latency + 1e-9
    assert min(ratios.values()) >= max(ratios.values()) - SLACK - 1e-9
    others = all_splits(shapes, round_to or 32)
    for split, taken in zip(others, Decoding(shapes).each(others).tolist(), strict=True):
        if max(ratios.values()) - SLACK <= taken / dense <= latency - 1e-9:
            assert any(holds(other, split) for other in found), split
    assert {width % (round_to or 32) for split in found for width in (split.hidden, split.mlp)} == {0}


def holds(one: Widths, other: Widths) -> bool:
    """Whether one has at least as much of everything."""
    return all(one.of(name) >= other.of(name) for name in ("hidden", "mlp", "groups")) and one.blocks >= other.blocks


def test_a_step_of_its_own_is_kept_and_the_stream_can_be_cut_alone(wide: StreamedModel):
    shapes = timed(wide)
    rounded = fast_enough(shapes, SliceStep(model="x", latency=0.6, round_to=24))
    assert {split.mlp % 24 for split in rounded if split.mlp < 512} == {0}
    assert {split.hidden % 24 for split in rounded if split.hidden < 128} == {0}
    for alone in ({"budget": "hidden"}, {"refit": False}):
        (split,) = fast_enough(shapes, SliceStep(model="x", latency=0.85, **alone))
        assert split == replace(shapes.dense, hidden=split.hidden)
        wider = replace(split, hidden=split.hidden + 32)
        assert step_by_hand(shapes, split) <= 0.85 * step_by_hand(shapes, shapes.dense) < step_by_hand(shapes, wider)


def test_what_cannot_be_reached_is_refused_with_the_least(wide: StreamedModel):
    shapes = timed(wide)
    with pytest.raises(
        UserError,
        match=r"^latency 0.1 cannot be reached: the least is 0\.\d+ \(hidden=1,mlp=512,groups=2,blocks=5\)$",
    ):
        fast_enough(shapes, SliceStep(model="x", latency=0.1, refit=False))


def test_a_mixture_is_refused(tmp_path: Path):
    model = stream(build_tiny(family_config("mixtral"), tmp_path / "mixture"))
    with pytest.raises(UserError, match=r"^latency: what a mixture of experts takes is not predicted"):
        time_decoding(model, SliceStep(model="x", latency=0.8), None)


def test_the_plan_says_what_decoding_takes_and_will_take(wide: StreamedModel):
    dense = 1000 * step_by_hand(timed(wide), Layout(wide).dense)
    remark = plan_slice(wide, SliceStep(model="x", latency=0.7)).remark
    assert remark is not None
    assert f"decoding, one sequence: {dense:.3g} ms a token, predicted then: " in remark
    assert "splits over hidden, mlp, groups, blocks" in remark


def test_known_times_are_taken_only_where_they_are_of_all_products(
    wide: StreamedModel, monkeypatch: pytest.MonkeyPatch
):
    timed(wide)
    known, step = wide.times, SliceStep(model="x", latency=0.8, dtype="bfloat16")
    assert known is not None
    anew = StepTimes(1.0, 1, {})
    asked = []
    monkeypatch.setattr("slimlm.slice.plan.step_times", lambda *given: asked.append(given) or anew)
    assert time_decoding(wide, step, known) is known
    assert not asked
    fewer = replace(known, products=dict(list(known.products.items())[1:]))
    assert time_decoding(wide, step, fewer) is anew
    ((model, shapes, dtype),) = asked
    assert (model, dtype) == (wide, torch.bfloat16)
    assert shapes == products_to_time(Shapes(Layout(wide)))
