"""What a block takes in parts, experts above all, comes out as if it were taken whole."""

from pathlib import Path

import pytest
import torch

from slimlm.statistics.grams import in_turn
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.families.configs import family_config
from tests.helpers import run


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("room", [1, 2 * 8 * 48**2, 1 << 30])
def test_every_group_has_its_turn_once_and_only_experts_wait_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, room: int
):
    model = stream(build_tiny(family_config(name), tmp_path / "model"))
    monkeypatch.setattr("slimlm.statistics.grams.GRAM_BYTES", room)
    for block in model.blocks:
        groups, experts = list(block.groups), block.family.experts
        parts = list(in_turn(groups))
        assert [group for part in parts for group in part] == groups
        others = [group for group in groups if not experts or group.first not in experts.matrices]
        assert parts[0][: len(others)] == others
        if room == 1 and experts:
            assert len(parts) >= len(experts.matrices)
        elif room == 1 << 30:
            assert len(parts) == 1


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "slimlm"])
def test_no_expert_is_left_out_where_they_are_pruned_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    """Those whose turn is later see what the earlier ones became, so that weights may differ."""
    monkeypatch.setattr("slimlm.statistics.grams.GRAM_BYTES", 1)
    path, tokens = build_tiny(family_config("qwen3_moe"), tmp_path / "model"), random_tokens(20, 24)
    parts, _, _ = run(stream(path), tokens, tmp_path / "parts", method=method, sparsity=0.5)
    experts = [name for name in parts if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    for name in experts:
        packed = parts[name] if "down" in name else torch.cat([parts[name], parts[partner(name)]])
        assert int((packed == 0).sum()) == packed.numel() // 2, name


def partner(name: str) -> str:
    """Gate and up are one matrix to prune."""
    return name.replace("gate_proj", "up_proj") if "gate" in name else name.replace("up_proj", "gate_proj")


def test_experts_narrowed_in_turn_are_as_if_narrowed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, tokens = build_tiny(family_config("qwen3_moe"), tmp_path / "model"), random_tokens(20, 24)
    whole, _, _ = run(stream(path), tokens, tmp_path / "whole", method="slice", widths="mlp=16")
    monkeypatch.setattr("slimlm.statistics.grams.GRAM_BYTES", 1)
    parts, _, _ = run(stream(path), tokens, tmp_path / "parts", method="slice", widths="mlp=16")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=1e-5), name


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_large_matrices_taken_one_after_another_are_as_if_taken_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    path, tokens = build_tiny(CONFIGS["llama"], tmp_path / "model"), random_tokens(8, 24)
    whole, _, _ = run(stream(path), tokens, tmp_path / "whole", method=method, sparsity=0.4)
    monkeypatch.setattr("slimlm.prune.updates.CHUNK_ELEMENTS", 1)
    parts, _, _ = run(stream(path), tokens, tmp_path / "parts", method=method, sparsity=0.4)
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=1e-5), name
