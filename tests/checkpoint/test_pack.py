import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from slimlm.checkpoint.pack import PACKED_NAME, pack, unpack
from slimlm.cli import app
from slimlm.errors import UserError
from tests.conftest import CONFIGS, build_tiny


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A tiny bf16 Llama with half of every matrix zero, and a minus zero."""
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor.view(-1)[::2] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = -0.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def bits(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.view(torch.int16) for name, tensor in load_file(path / "model.safetensors").items()}


def test_packing_and_unpacking_gives_every_bit_back(pruned: Path, tmp_path: Path):
    before, after = pack(pruned, tmp_path / "packed")
    packed, whole = unpack(tmp_path / "packed", tmp_path / "again")
    assert packed == after
    assert 0 <= whole - before < 64  # another writer's file: the header's padding
    found, expected = bits(tmp_path / "again"), bits(pruned)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    names = {path.name for path in pruned.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "again" / name).read_bytes() == (pruned / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_half_zeros_take_nine_sixteenths(pruned: Path, tmp_path: Path):
    pack(pruned, tmp_path / "packed")
    archive = load_file(tmp_path / "packed" / "model.safetensors")
    weight = load_file(pruned / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    parts = [archive[f"model.layers.1.mlp.up_proj.weight#{part}"] for part in ("mask", "values")]
    assert sum(part.nbytes for part in parts) == weight.nbytes * 9 // 16
    assert "model.norm.weight" in archive  # nothing to gain there
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_what_is_no_archive_or_no_place_is_refused(pruned: Path, tmp_path: Path):
    with pytest.raises(UserError, match="is not an archive of `slimlm pack`"):
        unpack(pruned, tmp_path / "again")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for how in (pack, unpack):
        with pytest.raises(UserError, match="taken exists and is not empty"):
            how(pruned, tmp_path / "taken")
    pack(pruned, tmp_path / "packed")
    document = json.loads((tmp_path / "packed" / PACKED_NAME).read_text())
    for change, message in [
        ({"format": 2}, "is of format 2"),
        ({"shapes": 3}, "is damaged"),
        ({"shapes": {}}, "has no shape for"),
        ({"shapes": {name: [1, 3] for name in document["shapes"]}}, "is not one of 3 weights"),
    ]:
        (tmp_path / "packed" / PACKED_NAME).write_text(json.dumps({**document, **change}))
        with pytest.raises(UserError, match=message):
            unpack(tmp_path / "packed", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_commands_say_what_was_saved(pruned: Path, tmp_path: Path):
    for command, source, target in (("pack", pruned, "packed"), ("unpack", tmp_path / "packed", "again")):
        result = CliRunner().invoke(app, [command, str(source), str(tmp_path / target)])
        assert result.exit_code == 0, result.output
        assert "bytes of weights ->" in result.output


def test_templates_in_a_directory_come_back_too(pruned: Path, tmp_path: Path):
    (pruned / "additional_chat_templates").mkdir()
    (pruned / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (pruned / ".cache").mkdir()
    pack(pruned, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert not (tmp_path / "again" / ".cache").exists()


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("part", ["mask", "values", "files", "bits", "negative"])
def test_a_damaged_archive_is_named_and_nothing_written(pruned: Path, tmp_path: Path, part: str):
    pack(pruned, tmp_path / "packed")
    weights, listing = tmp_path / "packed" / "model.safetensors", tmp_path / "packed" / PACKED_NAME
    tensors, document = load_file(weights), json.loads(listing.read_text())
    message = {"files": "it has no files/", "bits": f"the mask of {NAME} is not one of bits", "negative": "negative"}
    if part == "files":
        shutil.rmtree(tmp_path / "packed" / "files")
    elif part == "negative":
        document["shapes"][NAME] = [-width for width in document["shapes"][NAME]]
        listing.write_text(json.dumps(document))
    elif part == "bits":
        save_file({**tensors, f"{NAME}#mask": tensors[f"{NAME}#mask"].short()}, weights, metadata={"format": "pt"})
    else:
        del tensors[f"{NAME}#{part}"]
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message.get(part, f"it lacks the {part} of {NAME}")):
        unpack(tmp_path / "packed", tmp_path / "again")
    assert not list(tmp_path.glob("again*"))


def test_what_compress_did_not_finish_is_not_cleared(pruned: Path, tmp_path: Path):
    journal = tmp_path / "out.partial" / "work" / "journal.jsonl"
    journal.parent.mkdir(parents=True)
    work = '{"step": "start", "fingerprint": {}}\n{"step": "written model.layers.0"}\n{"step": "wri'
    journal.write_text(work)
    with pytest.raises(UserError, match=r"out\.partial holds what `slimlm compress` did not finish"):
        pack(pruned, tmp_path / "out")
    assert journal.read_text() == work


def test_an_archive_inside_its_source_is_refused(pruned: Path):
    with pytest.raises(UserError, match="is inside"):
        pack(pruned, pruned / "packed")
