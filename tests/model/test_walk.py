import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig

from slimlm.checkpoint.prefetch import Prefetch
from slimlm.errors import RunFailure, UserError
from slimlm.families import FAMILIES
from slimlm.model import ends
from slimlm.model.ends import embed, logits
from slimlm.model.walk import walk
from slimlm.progress import Progress
from tests.conftest import CONFIGS, build_tiny, logits_of, random_tokens, stream


def walked_logits(model, batches):
    flow = embed(model, batches)
    for block in walk(model, Progress(), "walking"):
        block.advance(flow)
    found: dict[int, list[torch.Tensor]] = {}
    for number, _, part in logits(model, flow):
        found.setdefault(number, []).append(part)
    return [torch.cat(parts, dim=1) for parts in found.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_walk_that_changes_nothing_gives_the_models_own_logits_exactly(tiny: Path, dtype: torch.dtype):
    batches = list(random_tokens(5, 24).split(2))
    for got, tokens in zip(walked_logits(stream(tiny, dtype), batches), batches, strict=True):
        assert torch.equal(got, logits_of(tiny, tokens, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tables_and_logits_go_in_pieces_without_changing_anything(
    tiny: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    whole = walked_logits(stream(tiny, dtype), [random_tokens(3, 24)])
    monkeypatch.setattr(ends, "LARGE_TABLE", 0)
    monkeypatch.setattr(ends, "LARGE_LOGITS", 4 * 3 * 7 * stream(tiny).config.vocab_size)
    model = stream(tiny, dtype)
    (pieces,) = walked_logits(model, [random_tokens(3, 24)])
    assert torch.allclose(pieces.float(), whole[0].float(), atol=1e-5)
    assert all(parameter.is_meta for parameter in model.model.parameters())
    sizes = [part.shape[1] for _, _, part in logits(model, embed(model, [random_tokens(3, 24)]))]
    assert sizes == [7, 7, 7, 3]


def test_a_block_fetched_ahead_is_the_block(tiny: Path):
    batches = [random_tokens(2, 16)]
    expected = walked_logits(stream(tiny), batches)
    model = stream(tiny)
    model.ahead = Prefetch(model.checkpoint, model.device, threaded=True)
    assert torch.equal(walked_logits(model, batches)[0], expected[0])
    assert not model.ahead.coming  # all that was asked for was used
    with model.blocks[0].loaded():
        assert set(model.ahead.coming) == set(model.keys_of[model.family.block(1)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, which nothing can install")
def test_on_a_gpu_the_walk_is_the_models_too(tiny: Path):
    model = stream(tiny, device="cuda")
    got = walked_logits(model, [random_tokens(2, 16)])[0].cpu()
    assert torch.allclose(got, walked_logits(stream(tiny), [random_tokens(2, 16)])[0], atol=1e-3)


def test_only_the_part_in_use_is_in_memory(tiny_llama: Path):
    model = stream(tiny_llama)
    walked_logits(model, [random_tokens()])
    assert all(parameter.is_meta for parameter in model.model.parameters())
    with model.blocks[1].loaded() as block:
        assert not any(parameter.is_meta for parameter in block.module.parameters())
        assert all(parameter.is_meta for parameter in model.blocks[0].module.parameters())


def test_equal_block_arguments_are_kept_once(tiny_llama: Path):
    flow = embed(stream(tiny_llama), list(random_tokens(8).split(2)))
    assert len({id(calls[0]) for calls in flow.calls}) == 1


def test_batches_of_different_length_keep_their_own_arguments(tiny_llama: Path):
    batches = [random_tokens(2, 24), random_tokens(2, 10), random_tokens(2, 24)]
    for got, tokens in zip(walked_logits(stream(tiny_llama), batches), batches, strict=True):
        assert torch.equal(got, logits_of(tiny_llama, tokens))


def test_activations_that_overflow_stop_the_run_and_name_the_block(tiny_llama: Path):
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(1e38)
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e38)
    save_file(tensors, tiny_llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunFailure, match=r"model\.layers\.1 hold"):
        walked_logits(stream(tiny_llama), [random_tokens()])


def test_a_block_without_its_weights_is_refused_by_name(tiny_llama: Path):
    tensors = load_file(tiny_llama / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tiny_llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        stream(tiny_llama)


def test_a_wrong_shape_is_refused_by_name_instead_of_reinitialised(tiny_llama: Path):
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(tensors, tiny_llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight .* shape \[48, 31\].*\[48, 32\]"):
        stream(tiny_llama)


def test_a_head_that_config_ties_but_file_does_not_is_refused(tmp_path: Path):
    path = build_tiny(CONFIGS["llama-tied"], tmp_path / "tied")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="config ties"):
        stream(path)


def test_every_block_gets_its_own_arguments_in_a_model_of_mixed_attention(tmp_path: Path, monkeypatch):
    """Replaying block 0's arguments on every block would be wrong here: half the blocks look back 8 tokens only."""
    config = Gemma3TextConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    path = build_tiny(config, tmp_path / "gemma3")
    monkeypatch.setitem(FAMILIES, "gemma3_text", replace(FAMILIES["llama"], model_type="gemma3_text"))
    batches = list(random_tokens(4, 40).split(2))
    model = stream(path)
    flow = embed(model, batches)
    assert flow.calls[0][0] is not flow.calls[0][1]
    for got, tokens in zip(walked_logits(model, batches), batches, strict=True):
        assert torch.equal(got, logits_of(path, tokens))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**15),
        ("intermediate_size", -4),
        ("head_dim", 2.5),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(tiny_llama: Path, field: str, value: float):
    config = json.loads((tiny_llama / "config.json").read_text())
    (tiny_llama / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=field):
        stream(tiny_llama)
