from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimlm.errors import RunFailure, UserError
from tests.conftest import CONFIGS, build_tiny, logits_of, random_tokens, stream


def walked_logits(model, batches):
    flow = model.embed(batches)
    for index in range(len(model.blocks)):
        with model.block(index):
            model.advance(index, flow)
    return list(model.logits(flow))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_walk_that_changes_nothing_gives_the_models_own_logits_exactly(tiny: Path, dtype: torch.dtype):
    batches = list(random_tokens(5, 24).split(2))
    for got, tokens in zip(walked_logits(stream(tiny, dtype), batches), batches, strict=True):
        assert torch.equal(got, logits_of(tiny, tokens, dtype))


def test_only_the_part_in_use_is_in_memory(tiny_llama: Path):
    model = stream(tiny_llama)
    walked_logits(model, [random_tokens()])
    assert all(parameter.is_meta for parameter in model.model.parameters())
    with model.block(1) as block:
        assert not any(parameter.is_meta for parameter in block.parameters())
        assert all(parameter.is_meta for parameter in model.blocks[0].parameters())


def test_equal_block_arguments_are_kept_once(tiny_llama: Path):
    flow = stream(tiny_llama).embed(list(random_tokens(8).split(2)))
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
