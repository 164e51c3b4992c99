"""Refinement of a block at a time: better on what was held out or nothing, and nothing that is to stay moved."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimlm.fit import refine
from slimlm.linalg.regression import judging
from slimlm.model import ends
from slimlm.model.ends import divergences, head_loaded
from slimlm.model.skip import skipping
from slimlm.model.streamed import StreamedModel
from slimlm.run import Outcome
from tests.conftest import CONFIGS, build_tiny, logits_of, random_tokens, stream
from tests.families.configs import SETTINGS, family_config
from tests.helpers import inputs_of, run, stock

SLICE = {"method": "slice", "widths": "mlp=32"}
PRUNE = {"method": "slimlm", "sparsity": 0.5}
BATCH = 8  # windows: two a lane


def error_by_hand(dense: Path, small: Path, tokens: torch.Tensor) -> float:
    """Of the first block's output on the windows that judge, relative to the dense one's."""
    held = tokens[judging(len(tokens))]
    (wanted,), (found,) = (inputs_of(stock(path), held, ["model.layers.1.input_layernorm"]) for path in (dense, small))
    wanted, found = wanted.flatten(0, -2).double(), found.flatten(0, -2).double()
    scale = wanted.square().mean(-1) + stock(dense).config.rms_norm_eps
    return float(((found - wanted).square().mean(-1) / scale).mean())


def closed(tokens: torch.Tensor, path: Path, into: Path, **step: object) -> dict[str, torch.Tensor]:
    """A run whose refinement beats nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "RATE", 3.0)
        tensors, outcome, _ = run(stream(path), tokens, into, BATCH, **step, refine=2)
    assert set(by_block(outcome).values()) == {1.0}
    return tensors


def two_blocks(name: str, path: Path) -> Path:
    config = copy.deepcopy(CONFIGS[name])
    config.num_hidden_layers = 2
    return build_tiny(config, path)


def by_block(outcome: Outcome) -> dict[str, float]:
    found: dict[str, float] = outcome.notes.get("refit", outcome.notes)["refined"]
    return found


def test_the_first_block_gets_better_on_windows_that_nothing_saw_by_what_is_said(tmp_path: Path):
    path, tokens = two_blocks("llama", tmp_path / "dense"), random_tokens(120, 32)
    closed(tokens, path, tmp_path / "closed", **SLICE)
    _, outcome, _ = run(stream(path), tokens, tmp_path / "refined", BATCH, **SLICE, refine=6)
    before, after = (error_by_hand(path, tmp_path / name / "model", tokens) for name in ("closed", "refined"))
    said = by_block(outcome)
    assert after < 0.97 * before
    assert said["0"] == pytest.approx(after / before, rel=1e-3)
    assert len(said) == 2
    assert max(said.values()) <= 1


def test_the_closed_form_stays_where_it_is_not_beaten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of so few windows none is kept from it: it is what there is without refinement."""
    monkeypatch.setattr(refine, "RATE", 3.0)
    path, tokens = two_blocks("llama", tmp_path / "dense"), random_tokens(40, 16)
    plain, *_ = run(stream(path), tokens, tmp_path / "plain", BATCH, **SLICE)
    refined, outcome, _ = run(stream(path), tokens, tmp_path / "refined", BATCH, **SLICE, refine=2)
    assert all(torch.equal(refined[name], tensor) for name, tensor in plain.items())
    assert set(by_block(outcome).values()) == {1.0}


@pytest.mark.parametrize("step", [SLICE, {**SLICE, "widths": "hidden=24,tied=1"}, PRUNE])
def test_the_last_block_gets_nearer_to_what_a_tied_head_says_by_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: dict[str, object]
):
    monkeypatch.setattr(ends, "LARGE_LOGITS", 4 * 4096 * (4 * 2) * 20)  # logits of a part of a window's tokens
    config = copy.deepcopy(CONFIGS["llama-tied"])
    config.num_hidden_layers = 1
    path, tokens = build_tiny(config, tmp_path / "dense"), random_tokens(120, 32)
    closed(tokens, path, tmp_path / "closed", **step)
    _, outcome, _ = run(stream(path), tokens, tmp_path / "refined", BATCH, **step, refine=6)
    shown = tokens[judging(len(tokens))]
    wanted, before, after = (
        logits_of(at, shown).double().log_softmax(-1)
        for at in (path, tmp_path / "closed" / "model", tmp_path / "refined" / "model")
    )
    before, after = ((wanted.exp() * (wanted - got)).sum(-1).mean() for got in (before, after))
    assert after < 0.98 * before
    assert by_block(outcome)["0"] == pytest.approx(float(after / before), rel=1e-3)


@pytest.mark.parametrize(("fewest", "every"), [(1, 4), (2000, 2), (8192, 1)])
def test_a_head_that_costs_more_than_the_block_reads_other_places_in_each_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fewest: int, every: int
):
    """Of windows of 30 tokens, if they are many, in twice as many passes; all of those that judge."""
    read: list[torch.Tensor] = []

    def seen(model: StreamedModel, x: torch.Tensor, *given: object) -> Iterator[torch.Tensor]:
        if given[0].requires_grad:  # type: ignore[attr-defined]
            read.append(x)
        else:
            assert x.shape[1] == 30
        return divergences(model, x, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(refine, "FEWEST", fewest)
    monkeypatch.setattr(refine, "PATIENCE", 9)
    monkeypatch.setattr(refine, "divergences", seen)
    path, tokens = two_blocks("llama-tied", tmp_path / "dense"), random_tokens(160, 30)
    run(stream(path), tokens, tmp_path / "refined", BATCH, **SLICE, refine=4)
    learned = torch.cat([x.flatten(0, 1) for x in read])
    own = tokens[~judging(160)]
    prefixes = {tuple(window[: 1 + place]) for window in own.tolist() for place in range(30)}  # states hang on them
    assert {x.shape[1] for x in read} <= {30 // every, -(-30 // every)}
    assert len(learned) == own.numel() * 4 * min(2, every) // every
    assert len(learned.unique(dim=0)) == len(prefixes)


@pytest.mark.parametrize("step", [SLICE, PRUNE])
def test_a_model_that_computes_in_bf16_is_refined_to_what_its_tied_head_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: dict[str, object]
):
    """As on a GPU, where errors are compared in the model's own dtype, too."""
    monkeypatch.setattr("slimlm.device.product_dtype", lambda device, dtype=torch.float32: dtype)
    path, tokens = two_blocks("llama-tied", tmp_path / "dense"), random_tokens(120, 32)
    _, outcome, _ = run(stream(path, torch.bfloat16), tokens, tmp_path / "refined", BATCH, **step, refine=3)
    assert by_block(outcome)["1"] < 1


@pytest.mark.parametrize("family", SETTINGS)
def test_divergences_are_those_of_stock_logits_however_many_are_there_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
):
    path = build_tiny(family_config(family), tmp_path)
    model, plain = stream(path), stock(path)
    states: list[torch.Tensor] = []
    last = plain.get_submodule(model.family.blocks)[-1]
    last.register_forward_hook(lambda _, given, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        wanted, got = (
            plain(random_tokens(3, 8, seed=seed)).logits.double().log_softmax(-1).flatten(0, 1) for seed in (1, 2)
        )
    expected = (wanted.exp() * (wanted - got)).sum(-1).view(3, 8)
    monkeypatch.setattr(ends, "LARGE_LOGITS", 4 * 3 * (4 * 3 * plain.config.vocab_size))
    with head_loaded(model):
        found = list(divergences(model, *states, nullcontext))
    parts = [float(part.sum()) for part in expected.split(3, 1)]
    assert list(map(float, found)) == pytest.approx(parts, rel=1e-3)


@pytest.mark.parametrize("step", [SLICE, PRUNE])
def test_no_closed_form_sees_the_windows_that_judge(tmp_path: Path, step: dict[str, object]):
    path, tokens = two_blocks("llama", tmp_path / "dense"), random_tokens(80, 16)
    others = torch.where(judging(len(tokens))[:, None], random_tokens(80, 16, seed=2), tokens)
    first = closed(tokens, path, tmp_path / "first", **step)
    second = closed(others, path, tmp_path / "second", **step)
    assert not torch.equal(tokens, others)
    blocks = [name for name in first if ".layers." in name]
    assert blocks
    assert all(torch.equal(first[name], second[name]) for name in blocks)


@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_zeros_stay_and_what_is_left_moves(tmp_path: Path, pattern: dict[str, object]):
    path, tokens = two_blocks("llama-biased", tmp_path / "dense"), random_tokens(120, 32)
    plain = closed(tokens, path, tmp_path / "closed", method="slimlm", **pattern)
    refined, outcome, _ = run(stream(path), tokens, tmp_path / "refined", BATCH, method="slimlm", **pattern, refine=2)
    assert outcome.zeros == pytest.approx(0.5, abs=1e-3)
    name = "model.layers.0.mlp.down_proj.weight"  # later blocks see another stream
    assert torch.equal(plain[name] == 0, refined[name] == 0)
    assert not torch.equal(plain[name], refined[name])
    assert not torch.equal(plain["model.layers.0.mlp.up_proj.bias"], refined["model.layers.0.mlp.up_proj.bias"])


@pytest.mark.parametrize(("family", "linear"), [("llama", "self_attn.q_proj"), ("opt", "fc1")])
def test_what_is_skipped_is_not_refined(tmp_path: Path, family: str, linear: str):
    config = CONFIGS[family] if family in CONFIGS else family_config(family)
    path, tokens = build_tiny(config, tmp_path / "dense"), random_tokens(40, 16)
    model = stream(path)
    with skipping(model, [f"*.{linear}"]):
        tensors, *_ = run(model, tokens, tmp_path / "run", BATCH, method="slimlm", sparsity=0.5, refine=2)
    dense = load_file(path / "model.safetensors")
    names = [name for name in dense if f".{linear}." in name]
    assert len(names) >= 2
    assert all(torch.equal(tensors[name], dense[name]) for name in names)


def test_the_same_seed_gives_the_same_bytes_and_batches_are_mixed_by_it(tmp_path: Path):
    path, tokens = two_blocks("llama", tmp_path / "dense"), random_tokens(120, 32)
    first, again, other = (
        run(stream(path), tokens, tmp_path / str(number), BATCH, **SLICE, refine=2, seed=seed)[0]
        for number, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())
    assert any(not torch.equal(first[name], tensor) for name, tensor in other.items())
