import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimlm.checkpoint.reader import INDEX_NAME, Checkpoint
from slimlm.errors import UserError


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def test_a_sharded_checkpoint_reads_like_a_single_one(sharded: Path, tiny_llama: Path):
    checkpoint, whole = Checkpoint(sharded), load_file(tiny_llama / "model.safetensors")
    assert {name: stored.shape for name, stored in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in whole.items()
    }
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in whole.items())
    checkpoint.check_finite()


def test_a_missing_shard_is_named(sharded: Path):
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(UserError, match=f"shard .*{victim.name} is missing"):
        Checkpoint(sharded)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_a_truncated_shard_is_named(sharded: Path, keep: int):
    victim = sorted(sharded.glob("*.safetensors"))[0]
    content = victim.read_bytes()
    victim.write_bytes(content[:keep])
    with pytest.raises(UserError, match=f"{victim.name} is truncated"):
        Checkpoint(sharded)


def test_an_index_that_names_an_absent_tensor_is_refused(sharded: Path):
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"ghost\.weight is not in"):
        Checkpoint(sharded)


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_points_outside_the_directory_is_refused(sharded: Path, file: str):
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["lm_head.weight"] = file
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the model directory"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_a_broken_index_is_refused(sharded: Path, text: str):
    (sharded / INDEX_NAME).write_text(text)
    with pytest.raises(UserError, match=INDEX_NAME):
        Checkpoint(sharded)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickled weights only.*save_pretrained"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_a_weight_that_is_not_finite_is_named(tiny_llama: Path, value: float, word: str):
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 4] = value
    save_file(tensors, tiny_llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.layers\.1\.self_attn\.k_proj\.weight .* holds {word}"):
        Checkpoint(tiny_llama).check_finite()
