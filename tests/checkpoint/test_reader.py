import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimlm.checkpoint.kinds import INDEX_NAME
from slimlm.checkpoint.reader import Checkpoint
from slimlm.errors import UserError
from tests.conftest import stream


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


def edit_index(directory: Path, **files: str) -> None:
    index = json.loads((directory / INDEX_NAME).read_text())
    index["weight_map"] |= {name.replace("_", "."): file for name, file in files.items()}
    (directory / INDEX_NAME).write_text(json.dumps(index))


def test_what_only_the_index_knows_decides_nothing_unless_it_is_needed(sharded: Path):
    edit_index(sharded, ghost_weight=sorted(sharded.glob("*.safetensors"))[0].name)
    assert Checkpoint(sharded).absent == {"ghost.weight"}
    stream(sharded)
    shard = next(path for path in sharded.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    left = {name: tensor for name, tensor in load_file(shard).items() if name != "model.norm.weight"}
    save_file(left, shard, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model\.norm\.weight.*index lists more than its files hold"):
        stream(sharded)


@pytest.mark.parametrize(
    "file", ["../../etc/passwd", "/etc/passwd", "..", "", "a/../../b", "a//b", "a\\b", "C:/b", "a/\0", "x" * 256]
)
def test_an_index_that_points_outside_the_directory_is_refused(sharded: Path, file: str):
    edit_index(sharded, lm_head_weight=file)
    with pytest.raises(UserError, match="outside the model directory"):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 10**5])
def test_a_broken_index_is_refused(sharded: Path, text: str):
    (sharded / INDEX_NAME).write_text(text)
    with pytest.raises(UserError, match=INDEX_NAME):
        Checkpoint(sharded)


def test_once_the_model_is_known_nothing_else_counts(tiny_llama: Path):
    tensors, before = load_file(tiny_llama / "model.safetensors"), Checkpoint(tiny_llama)
    unused = {"vision.weight": torch.full((1000, 1000), torch.nan), "a.scale": torch.ones(3).to(torch.float8_e4m3fn)}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()} | unused, tiny_llama / "model.safetensors")
    checkpoint = stream(tiny_llama).checkpoint
    checkpoint.check_finite()
    assert checkpoint.main_dtype == torch.bfloat16
    assert checkpoint.elements == before.elements
    header = int.from_bytes((tiny_llama / "model.safetensors").read_bytes()[:8], "little")
    assert checkpoint.bytes_on_disk() == 2 * before.elements + 8 + header + 3


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
