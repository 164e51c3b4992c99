"""Refinement of a block at a time: better on what was held out or nothing, and nothing that is to stay moved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimlm.fit import refine
from slimlm.linalg.regression import held_out
from slimlm.model.skip import skipping
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.families.configs import family_config
from tests.helpers import inputs_of, run, stock

SLICE = {"method": "slice", "widths": "mlp=32"}


def error_by_hand(dense: Path, small: Path, tokens: torch.Tensor) -> float:
    """Of the first block's output on the windows that are held out, relative to the dense one's."""
    held = tokens[held_out(len(tokens))]
    (wanted,), (found,) = (inputs_of(stock(path), held, ["model.layers.1.input_layernorm"]) for path in (dense, small))
    wanted, found = wanted.flatten(0, -2).double(), found.flatten(0, -2).double()
    scale = wanted.square().mean(-1) + stock(dense).config.rms_norm_eps
    return float(((found - wanted).square().mean(-1) / scale).mean())


def test_the_first_block_gets_better_on_held_out_windows_by_what_is_said(tmp_path: Path):
    path, tokens = build_tiny(CONFIGS["llama"], tmp_path / "dense"), random_tokens(200, 32)
    errors = []
    for epochs in (0, 8):
        _, outcome, _ = run(stream(path), tokens, tmp_path / str(epochs), **SLICE, refine=epochs)
        errors.append(error_by_hand(path, tmp_path / str(epochs) / "model", tokens))
    said = outcome.notes["refit"]["refined"]
    assert errors[1] < 0.97 * errors[0]
    assert said["0"] == pytest.approx(errors[1] / errors[0], rel=1e-3)
    assert len(said) == 3
    assert max(said.values()) <= 1


def test_the_closed_form_stays_where_it_is_not_beaten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refine, "RATE", 3.0)
    path, tokens = build_tiny(CONFIGS["llama"], tmp_path / "dense"), random_tokens(40, 16)
    plain, *_ = run(stream(path), tokens, tmp_path / "plain", **SLICE)
    refined, outcome, _ = run(stream(path), tokens, tmp_path / "refined", **SLICE, refine=2)
    assert all(torch.equal(refined[name], tensor) for name, tensor in plain.items())
    assert set(outcome.notes["refit"]["refined"].values()) == {1.0}


@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_zeros_stay_and_what_is_left_moves(tmp_path: Path, pattern: dict[str, object]):
    path, tokens = build_tiny(CONFIGS["llama-biased"], tmp_path / "dense"), random_tokens(200, 32)
    runs = [
        run(stream(path), tokens, tmp_path / str(epochs), method="slimlm", **pattern, refine=epochs)
        for epochs in (0, 4)
    ]
    (plain, _, _), (refined, outcome, _) = runs
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
        tensors, *_ = run(model, tokens, tmp_path / "run", method="slimlm", sparsity=0.5, refine=3)
    dense = load_file(path / "model.safetensors")
    names = [name for name in dense if f".{linear}." in name]
    assert len(names) >= 2
    assert all(torch.equal(tensors[name], dense[name]) for name in names)


def test_the_same_seed_gives_the_same_bytes_and_batches_are_mixed_by_it(tmp_path: Path):
    path, tokens = build_tiny(CONFIGS["llama"], tmp_path / "dense"), random_tokens(200, 32)
    first, again, other = (
        run(stream(path), tokens, tmp_path / str(number), **SLICE, refine=2, seed=seed)[0]
        for number, seed in enumerate((0, 0, 1))
    )
    assert all(torch.equal(first[name], tensor) for name, tensor in again.items())
    assert any(not torch.equal(first[name], tensor) for name, tensor in other.items())
