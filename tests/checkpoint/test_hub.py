"""What of a repository on the hub is fetched, and what is said where it cannot be."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from slimlm.checkpoint.code import code_files
from slimlm.checkpoint.companions import companions
from slimlm.checkpoint.hub import Access
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.resolve import resolve_model
from slimlm.checkpoint.skeleton import build_skeleton, load_config
from slimlm.errors import UserError
from tests.checkpoint.fake_hub import COMMIT, Hub, serving

TRAVELLING = (
    "USE_POLICY.md",
    "LICENSE.txt",
    "NOTICE",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "own.vocabulary",
)
BASIS = "slimlm/basis.safetensors"
IN_PLACE = ("additional_chat_templates/tools.jinja", BASIS, "README.md")
UNWANTED = (
    *("original/params.json", "original/tokenizer.model", "onnx/config.json", "onnx/model.onnx", ".gitattributes"),
    *("openvino/openvino_model.xml", "tiny.Q4.gguf", "pytorch_model.bin", "consolidated.safetensors", "tf_model.h5"),
    *("runs/events.json", "modeling_own.py", "requirements.txt"),
)


@pytest.fixture
def repository(tiny_llama: Path) -> Path:
    for name in (*TRAVELLING, *IN_PLACE, *UNWANTED):
        (tiny_llama / name).parent.mkdir(exist_ok=True)
        (tiny_llama / name).write_text(json.dumps({"of": name}))  # equal ones are fetched once
    return tiny_llama


def split(directory: Path, *shards: str) -> set[str]:
    """Deal a model's tensors out to the named shards, with an index."""
    tensors = load_file(directory / "model.safetensors")
    dealt = {name: shards[number % len(shards)] for number, name in enumerate(tensors)}
    for shard in shards:
        (directory / shard).parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensors[name] for name in tensors if dealt[name] == shard}, directory / shard, {"format": "pt"}
        )
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dealt}))
    return set(tensors)


def test_what_is_needed_is_fetched_and_no_more(repository: Path, tmp_path: Path, monkeypatch):
    access = Access("hf_secret", tmp_path / "cache")
    with serving(Hub(repository), monkeypatch) as hub:
        resolved = resolve_model("someone/tiny", "main", access=access)
    assert resolved.revision == COMMIT == resolved.path.name
    assert resolved.path.is_relative_to(tmp_path / "cache")
    assert sorted(hub.fetched) == sorted(set(hub.names()) - {*UNWANTED})
    assert {path.name for path in companions(resolved.path)} >= {*TRAVELLING}
    assert "Bearer hf_secret" in hub.tokens
    assert "hf_secret" not in repr(access)


def test_code_is_fetched_where_it_is_trusted(repository: Path, tmp_path: Path, monkeypatch):
    config = json.loads((repository / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    (repository / "config.json").write_text(json.dumps(config))
    code = "from transformers import LlamaForCausalLM\nclass OwnModel(LlamaForCausalLM): pass\n"
    (repository / "modeling_own.py").write_text(code)
    with serving(Hub(repository), monkeypatch) as hub:
        path = resolve_model("someone/tiny", trust_remote_code=True, access=Access(cache_dir=tmp_path / "cache")).path
    assert "modeling_own.py" in hub.fetched
    model = build_skeleton(load_config(path, True), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert [file.name for file in code_files(path)] == ["modeling_own.py"]


def test_shards_are_fetched_by_the_index_and_one_file_is_preferred(repository: Path, tmp_path: Path, monkeypatch):
    shards = ("model-00001-of-00002.safetensors", "more [weights]/model-00002-of-00002.safetensors")
    whole = repository / "model.safetensors"
    shutil.copy(whole, tmp_path)
    keys = split(repository, *shards)
    with serving(Hub(repository), monkeypatch) as hub:
        resolved = resolve_model("someone/tiny", access=Access(cache_dir=tmp_path / "cache"))
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == {*shards, BASIS}
    assert Checkpoint(resolved.path).tensors.keys() == keys
    shutil.copy(tmp_path / "model.safetensors", whole)
    with serving(Hub(repository), monkeypatch) as hub:
        resolve_model("someone/tiny", access=Access(cache_dir=tmp_path / "other"))
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == {"model.safetensors", BASIS}


def test_a_cache_without_what_nobody_needs_is_enough_offline(repository: Path, tmp_path: Path, monkeypatch):
    """With the listing that says what lacks, and without."""
    access = Access(cache_dir=tmp_path / "cache")
    with serving(Hub(repository), monkeypatch):
        snapshot = resolve_model("someone/tiny", access=access).path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (snapshot / "LICENSE.txt").unlink()
    assert resolve_model("someone/tiny", access=access).path == snapshot
    lacking = {"model.safetensors": None, "config.json": None}
    for name in lacking:
        kept = (snapshot / name).readlink()
        (snapshot / name).unlink()
        with pytest.raises(
            UserError, match=rf"lacks {name} in the cache, and HF_HUB_OFFLINE is set: unset it, or fetch"
        ):
            resolve_model("someone/tiny", access=access)
        (snapshot / name).symlink_to(kept)
    shutil.rmtree(next((tmp_path / "cache").glob("*/trees")))
    assert resolve_model("someone/tiny", access=access).path == snapshot
    with pytest.raises(UserError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        resolve_model("someone/other", access=access)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "model 'someone/tiny' holds GGUF files: give the checkpoint"),
        (lambda path: (path / "model.safetensors").unlink(), "model 'someone/tiny' holds GGUF files"),
        (lambda path: (path / "adapter_config.json").write_text("{}"), "PEFT adapter beside weights"),
        (
            lambda path: split(path, "a.safetensors") and (path / "a.safetensors").unlink(),
            "lacks a.safetensors on the hub",
        ),
        (lambda path: None, None),
    ],
)
def test_what_a_repository_is_instead_is_said(repository: Path, tmp_path: Path, monkeypatch, prepare, message):
    prepare(repository)
    with serving(Hub(repository), monkeypatch) as hub:
        if message is None:
            with pytest.raises(UserError, match="no revision 'v9' on the hub"):
                resolve_model("someone/tiny", "v9", access=Access(cache_dir=tmp_path / "cache"))
            with pytest.raises(UserError, match="'someone/else' is not on the hub"):
                resolve_model("someone/else", access=Access(cache_dir=tmp_path / "cache"))
            return
        with pytest.raises(UserError, match=message) as caught:
            resolve_model("someone/tiny", access=Access(cache_dir=tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    weights = [name for name in hub.fetched if name.endswith((".safetensors", ".gguf", ".bin"))]
    assert set(weights) <= {BASIS}


def test_a_gated_model_says_where_its_licence_is(repository: Path, tmp_path: Path, monkeypatch):
    with (
        serving(Hub(repository, gated=True), monkeypatch),
        pytest.raises(UserError, match=r"gated: accept its licence .* or give --token$"),
    ):
        resolve_model("someone/tiny", access=Access(cache_dir=tmp_path / "cache"))
