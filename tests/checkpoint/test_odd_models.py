"""Directories, files and names that are no plain model: each is compressed as stock transformers loads it, or refused
in one line that says what it is, with nothing written."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)
from transformers.utils import logging as transformers_logging

from slimlm.checkpoint import skeleton
from slimlm.checkpoint.kinds import INDEX_NAME
from slimlm.checkpoint.pack import pack
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.resolve import BUNDLED
from slimlm.checkpoint.skeleton import auto_dtype, load_config
from slimlm.cli import main
from tests.conftest import CONFIGS, SIZES, build_tiny, logits_of, random_tokens

WEIGHTS = "model.safetensors"
PRUNE = ("--method", "magnitude", "-s", "0.5", "--no-measure", "-o", "out")
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .helpers_own import FACTOR

class OwnConfig(LlamaConfig):
    model_type = "llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * FACTOR
        return out
"""
AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(CONFIGS["llama"], tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(CONFIGS["llama-tied"], tmp_path_factory.mktemp("plain") / "tied")


@pytest.fixture
def slimlm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., tuple[int, list[str]]]:
    """The command in an empty place: its exit code and the lines on standard error that are its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    verbosity = transformers_logging.get_verbosity()

    def run(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["slimlm", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code or 0, capsys.readouterr().err.splitlines()

    yield run
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def edit(path: Path, **values: object) -> None:
    """Change values of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def configure(model: Path, **values: object) -> None:
    edit(model / "config.json", **values)


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(model / WEIGHTS)), model / WEIGHTS, {"format": "pt"})


def shard(model: Path, *names: str, **metadata: str) -> None:
    """Deal the tensors out to files of these names."""
    tensors = load_file(model / WEIGHTS)
    dealt = {name: names[number % len(names)] for number, name in enumerate(tensors)}
    (model / WEIGHTS).unlink()
    for file in names:
        (model / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensors[name] for name in tensors if dealt[name] == file}, model / file, {"format": "pt"})
    (model / INDEX_NAME).write_text(json.dumps({"metadata": metadata, "weight_map": dealt}))


def only(model: Path, *names: str) -> None:
    """A directory of these files alone."""
    shutil.rmtree(model)
    put(model, *names)


def without_weights(model: Path, *names: str, content: str = "x") -> None:
    (model / WEIGHTS).unlink()
    put(model, *names, content=content)


def put(model: Path, *names: str, content: str = "x") -> None:
    for name in names:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(content)


# What is no model, or another one: how a directory comes to be it, and what is said. A text that comes back is the
# model's name on the command line.
def adapter_beside(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))


def packed(model: Path) -> str:
    pack(model, model.with_name("packed"))
    return str(model.with_name("packed"))


def broken_link(model: Path) -> str:
    model.with_name("link").symlink_to(model.with_name("gone"))
    return str(model.with_name("link"))


def dangling_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to("../blobs/gone")


def one_level_down(model: Path) -> None:
    shutil.copytree(model, model.with_name("inner"))
    shutil.rmtree(model)
    model.mkdir()
    model.with_name("inner").rename(model / "the-model")


def trainer_output(model: Path) -> None:
    only(model, "checkpoint-500/config.json", "checkpoint-1000/config.json", "checkpoint-60/config.json", "log.txt")


def base_model(model: Path) -> None:
    rewrite(model, lambda all: {name.removeprefix("model."): all[name] for name in all if name != "lm_head.weight"})
    configure(model, architectures=["LlamaModel"])


def headless(model: Path) -> None:
    rewrite(model, lambda all: {name: all[name] for name in all if name != "lm_head.weight"})


def multimodal(model_type: str, architecture: str, text_type: str | None) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        text = json.loads((model / "config.json").read_text()) | {"model_type": text_type}
        config = {"model_type": model_type, "architectures": [architecture], "vision_config": {}}
        (model / "config.json").write_text(json.dumps(config | ({"text_config": text} if text_type else {})))

    return make


def architecture(name: str, **values: object) -> Callable[[Path], None]:
    return lambda model: configure(model, architectures=[name], **values)


def unknown_code(model: Path) -> None:
    configure(model, model_type="ownish", auto_map=AUTO_MAP)
    (model / "modeling_own.py").write_text("raise SystemExit('it ran')")


def file(name: str, content: bytes = b"x") -> Callable[[Path], str]:
    def make(model: Path) -> str:
        (model / name).write_bytes(content)
        return str(model / name)

    return make


def stand_in(name: str, content: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(content)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
PAGE = "\n<!DOCTYPE html><html>Sign in</html>"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "adapter beside weights": (adapter_beside, "adapter beside weights, and transformers would load both"),
    "adapter": (lambda m: only(m, "adapter_config.json", "adapter_model.safetensors"), "PEFT adapter, not a model"),
    "gguf directory": (lambda m: only(m, "tiny.Q4_K.gguf"), "holds GGUF files: give the checkpoint"),
    "gguf beside a config": (lambda m: without_weights(m, "tiny.gguf"), "holds GGUF files"),
    "gguf file": (file("tiny.gguf", b"GGUF\3"), "is a GGUF file: give the checkpoint directory"),
    "gguf by its content": (file("tiny", b"GGUF\3"), "is a GGUF file"),
    "safetensors file": (lambda m: str(m / WEIGHTS), "is a file of weights: give the directory that holds it"),
    "config file": (lambda m: str(m / "config.json"), "is a file: give the directory"),
    "packed archive": (packed, "is an archive of `slimlm pack`: get the model back with `slimlm unpack"),
    "pickled": (lambda m: without_weights(m, "pytorch_model.bin"), "pickled weights only; slimlm reads safetensors"),
    "pickled, without config": (lambda m: only(m, "consolidated.pth"), "pickled weights only"),
    "pickled file": (file("pytorch_model.bin"), "is a file of pickled weights"),
    "tensorflow": (lambda m: without_weights(m, "tf_model.h5"), "holds TensorFlow weights only (tf_model.h5)"),
    "flax": (lambda m: without_weights(m, "flax_model.msgpack"), "holds Flax weights only"),
    "onnx": (lambda m: without_weights(m, "model.onnx"), "holds ONNX weights only"),
    "onnx, below": (lambda m: without_weights(m, "onnx/model.onnx"), "exported to ONNX or OpenVINO only"),
    "mlx": (lambda m: without_weights(m, "weights.npz"), "holds MLX weights only"),
    "mlx, quantised": (lambda m: configure(m, quantization={"bits": 4, "group_size": 64}), "quantised already"),
    "diffusers": (lambda m: only(m, "model_index.json", "unet/config.json"), "is a diffusers pipeline"),
    "meta's layout": (lambda m: only(m, "params.json", "consolidated.00.pth"), "in its maker's own layout"),
    "mistral's layout": (lambda m: only(m, "params.json", "consolidated.safetensors"), "in its maker's own layout"),
    "sentence-transformers": (stand_in("modules.json", "[]"), "is a sentence-transformers model"),
    "shards without index": (lambda m: without_weights(m, "model-00001-of-00002.safetensors"), f"no {INDEX_NAME}"),
    "weights of another name": (lambda m: (m / WEIGHTS).rename(m / "weights.safetensors"), "rename it"),
    "distributed": (lambda m: without_weights(m, "shard-00001-model-00001-of-00002.safetensors"), "is a distributed"),
    "no config": (lambda m: (m / "config.json").unlink(), "holds no config.json, without which weights say little"),
    "tokenizer only": (lambda m: only(m, "tokenizer.json", "tokenizer_config.json"), "no config.json but a tokenizer"),
    "tokenizer's config": (lambda m: (m / "tokenizer_config.json").rename(m / "config.json"), "is a tokenizer's"),
    "empty config": (stand_in("config.json", "{}"), "config.json is empty"),
    "config without type": (lambda m: configure(m, model_type=None), "names no model_type"),
    "config that is a list": (stand_in("config.json", "[]"), "it is not a mapping"),
    "config that is a pointer": (stand_in("config.json", LFS), "config.json is a Git LFS pointer"),
    "empty directory": (lambda m: only(m) or m.mkdir(), "is empty: give a directory"),
    "broken link": (broken_link, "which does not exist"),
    "dangling weights": (dangling_weights, "is a link to ../blobs/gone, which does not exist"),
    "git-lfs pointer": (stand_in(WEIGHTS, LFS), "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    "index that is a pointer": (lambda m: without_weights(m, INDEX_NAME, content=LFS), "index.json is a Git LFS"),
    "web page": (stand_in(WEIGHTS, PAGE), "is a web page, not the file itself"),
    "one level down": (one_level_down, "llama/the-model in it looks like one: give that"),
    "trainer output": (trainer_output, "the newest is"),
    "several models": (lambda m: only(m, "a/config.json", "b/config.json"), "holds several (a, b)"),
    "address": (lambda m: "https://huggingface.co/org/name", "is an address: give the hub id, org/name"),
    "address of a revision": (lambda m: "hf.co/org/name/tree/v2", "give the hub id, org/name --revision v2"),
    "address elsewhere": (lambda m: "https://example.org/model.zip", "is an address: give a hub id, or a directory"),
    "gemma 3": (multimodal("gemma3", "Gemma3ForConditionalGeneration", "gemma3_text"), "part, 'gemma3_text', with"),
    "llava": (multimodal("llava", "LlavaForConditionalGeneration", "llama"), "text part, 'llama', with"),
    "mistral 3": (multimodal("mistral3", "Mistral3ForConditionalGeneration", "mistral"), "text part, 'mistral', with"),
    "llama 4": (multimodal("llama4", "Llama4ForConditionalGeneration", "llama4_text"), "'llama4_text', either"),
    "qwen2-vl": (multimodal("qwen2_vl", "Qwen2VLForConditionalGeneration", None), "'qwen2_vl_text', either"),
    "classifier": (architecture("LlamaForSequenceClassification"), "LlamaForSequenceClassification"),
    "token classifier": (architecture("LlamaForTokenClassification"), "a model for another task"),
    "question answering": (architecture("LlamaForQuestionAnswering"), "a model for another task"),
    "reward model": (architecture("LlamaForRewardModel"), "a model for another task"),
    "encoder-decoder": (architecture("T5ForConditionalGeneration", is_encoder_decoder=True), "an encoder-decoder"),
    "base model": (base_model, "has no head (lm_head.weight)"),
    "without a head": (headless, "has no head (lm_head.weight)"),
    "code of an unknown class": (unknown_code, "with --trust-remote-code or without"),
    "weights elsewhere": (lambda m: configure(m, transformers_weights="../x.safetensors"), "outside the model"),
    "weights not there": (lambda m: configure(m, transformers_weights="x.safetensors"), "x.safetensors, which is not"),
}  # fmt: skip


def state_of(place: Path) -> dict[Path, int]:
    """Everything there is, and when files were written."""
    return {path: 0 if path.is_dir() else path.lstat().st_mtime_ns for path in place.rglob("*")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_is_named_in_one_line(name: str, llama: Path, tmp_path: Path, slimlm):
    model = shutil.copytree(llama, tmp_path / "llama")
    make, message = REFUSED[name]
    made = make(model)
    named = made if isinstance(made, str) else str(model)
    before = state_of(tmp_path)
    code, lines = slimlm("compress", "-m", named, *PRUNE)
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("slimlm: ")
    assert message in lines[0]
    assert state_of(tmp_path) == before


def test_the_way_to_a_text_part_that_is_told_leads_there(tmp_path: Path, slimlm):
    sizes = {**SIZES, "num_hidden_layers": 1}
    senses = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**senses, image_size=28, patch_size=14)
    config = LlavaConfig(text_config=LlamaConfig(**sizes), vision_config=vision, image_token_id=9)
    whole, new = tmp_path / "whole", tmp_path / "new"
    AutoModelForImageTextToText.from_config(config).save_pretrained(whole)
    _, (line,) = slimlm("compress", "-m", str(whole), *PRUNE)
    known = globals() | {"DIR": whole, "NEW": new}
    for code in line.split("`")[1:4:2]:
        exec(code, known)
    assert known["text"].config.model_type == "llama"
    AutoTokenizer.from_pretrained(BUNDLED["llama"]).save_pretrained(new)
    assert slimlm("compress", "-m", str(new), *PRUNE)[0] == 0
    tokens = random_tokens(2, 8)
    assert torch.equal(logits_of(new, tokens), known["whole"].eval()(input_ids=tokens).logits)


def test_the_newest_checkpoint_is_named(llama: Path, tmp_path: Path, slimlm):
    model = shutil.copytree(llama, tmp_path / "llama")
    trainer_output(model)
    assert slimlm("compress", "-m", str(model), *PRUNE)[1][0].endswith(f"the newest is {model / 'checkpoint-1000'}")


# What looks odd and loads: how it comes to be, and flags.
def leftover_index(model: Path) -> None:
    """Of other weights, as a merge leaves them beside."""
    whole = load_file(model / WEIGHTS)
    shard(model, "model-00001-of-00001.safetensors")
    save_file({name: tensor + 1 for name, tensor in whole.items()}, model / WEIGHTS, {"format": "pt"})


def twice(model: Path) -> None:
    """A tensor in two files, the index saying the first."""
    tensors = load_file(model / WEIGHTS)
    shard(model, "a.safetensors", "b.safetensors")
    name = "model.norm.weight"
    for file, add in (("a.safetensors", 1), ("b.safetensors", 2)):
        save_file(load_file(model / file) | {name: tensors[name] + add}, model / file, {"format": "pt"})


def unlisted(model: Path) -> None:
    shard(model, "a.safetensors", "b.safetensors")
    index = json.loads((model / INDEX_NAME).read_text())
    del index["weight_map"]["model.norm.weight"]
    (model / INDEX_NAME).write_text(json.dumps(index))


def stated(model: Path) -> None:
    shutil.copy(model / WEIGHTS, model / "other.safetensors")
    rewrite(model, lambda all: {name: tensor + 1 for name, tensor in all.items()})
    configure(model, transformers_weights="other.safetensors")


def unused(model: Path) -> None:
    """More of it than of the model, in another dtype, not finite, in one that nothing computes in, absurdly named."""
    more = {
        "vision_tower.weight": torch.full((1500, 1500), torch.inf),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "vision_tower.scale": torch.ones(3).to(torch.float8_e4m3fn),
        "position_ids": torch.arange(4),
    }
    rewrite(model, lambda all: {name: tensor.bfloat16() for name, tensor in all.items()} | more)
    configure(model, dtype="bfloat16")


def no_dtype(first: torch.dtype) -> Callable[[Path], None]:
    """A config that says none: the first floating-point tensor does, by its name, whether used or not."""

    def make(model: Path) -> None:
        more = {"a.counts": torch.arange(3), "b.unused": torch.ones(3, dtype=first)}
        rewrite(model, lambda all: {name: tensor.bfloat16() for name, tensor in all.items()} | more)
        configure(model, dtype=None)

    return make


def dtype_of_the_index(model: Path) -> None:
    rewrite(model, lambda all: {name: tensor.bfloat16() for name, tensor in all.items()})
    shard(model, "a.safetensors", dtype="float16")
    configure(model, dtype=None)


def linked(model: Path) -> None:
    (model / WEIGHTS).rename(model.with_name("blob"))
    (model / WEIGHTS).symlink_to("../blob")


def stock_with_code(model: Path) -> None:
    configure(model, auto_map=AUTO_MAP)
    (model / "modeling_own.py").write_text("raise SystemExit('it ran')")


def prefixless(model: Path) -> None:
    rewrite(model, lambda all: {name.removeprefix("model."): tensor for name, tensor in all.items()})


RIGHT: dict[str, Callable[[Path], object]] = {
    "plain": lambda model: None,
    "one file before a leftover index": leftover_index,
    "shards in folders": lambda model: shard(model, "x/part.safetensors", "y/part.safetensors", "z/a/b.safetensors"),
    "a tensor in two files": twice,
    "a tensor the index forgets": unlisted,
    "weights the config names": stated,
    "tensors that are not used": unused,
    "no dtype, float32 first": no_dtype(torch.float32),
    "no dtype, float16 first": no_dtype(torch.float16),
    "no dtype, fp8 first": no_dtype(torch.float8_e4m3fn),
    "the index says the dtype": dtype_of_the_index,
    "links": linked,
    "a stock model with code": stock_with_code,
    "names without prefix": prefixless,
    "beside pickles and the maker's own": lambda model: put(
        *(model, "pytorch_model.bin", "params.json", "consolidated.00.pth", "x.gguf", "model_index.json", "packed.json")
    ),
    "beside a training run": lambda model: put(model, "training_args.bin", "checkpoint-1/config.json"),
}  # fmt: skip


def assert_pruned(out: Path, model: Path, trust: bool = False) -> None:
    """What is left is what stock transformers loads of the model, bit by bit, and about half of the matrices is."""
    pruned = AutoModelForCausalLM.from_pretrained(out, dtype="auto", trust_remote_code=trust)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=pruned.dtype, trust_remote_code=trust)
    for (name, left), (_, all) in zip(pruned.state_dict().items(), dense.state_dict().items(), strict=True):
        left, all = left.float(), all.float()
        is_matrix = ".layers." in name and left.dim() == 2
        assert torch.equal(left, torch.where(left == 0, 0.0, all)), name
        assert abs((left == 0).float().mean() - 0.5 * is_matrix) < 0.05, name


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_compressed_is_what_stock_loads(name: str, llama: Path, tmp_path: Path, slimlm, monkeypatch):
    model = shutil.copytree(llama, tmp_path / "llama")
    RIGHT[name](model)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is to be asked"))
    code, lines = slimlm("compress", "-m", str(model), *PRUNE)
    assert code == 0, lines
    assert_pruned(Path("out"), model)
    assert not {*os.listdir("out")} & {"modeling_own.py", "modeling_own"}
    assert not {"auto_map", "transformers_weights"} & json.loads(Path("out/config.json").read_text()).keys()


@pytest.mark.parametrize("name", [name for name in RIGHT if "dtype" in name])
def test_the_dtype_is_the_one_that_stock_takes(name: str, llama: Path, tmp_path: Path):
    model = shutil.copytree(llama, tmp_path / "llama")
    RIGHT[name](model)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype="auto").dtype
    assert auto_dtype(load_config(model), Checkpoint(model)) == stock


@pytest.mark.parametrize("make", [base_model, headless])
def test_a_tied_head_need_not_be_there(make, tied: Path, tmp_path: Path, slimlm):
    model = shutil.copytree(tied, tmp_path / "tied")
    make(model)
    assert slimlm("compress", "-m", str(model), *PRUNE)[0] == 0
    assert_pruned(Path("out"), model)


@pytest.fixture
def own(llama: Path, tmp_path: Path) -> Path:
    """A model whose classes come with it."""
    model = shutil.copytree(llama, tmp_path / "own")
    (model / "modeling_own.py").write_text(OWN_CODE)
    (model / "helpers_own.py").write_text("FACTOR = 0.5\n")
    (model / "unrelated.py").write_text("")
    configure(model, auto_map=AUTO_MAP)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    return model


QUICK = ("--num-calibration-samples", "10", "--max-seq-length", "16", "--eval-windows", "2")
SLICED = ("--widths", "hidden=24", "--set", "budget=hidden", "--set", "weighting=none", "--no-refit")
METHODS = {
    "pruned": ("--method", "magnitude", "-s", "0.5"),
    "sliced": SLICED,
    "refitted": ("--widths", "mlp=32"),
    "repaired": ("--method", "slimlm", "-s", "0.5"),
}


@pytest.mark.parametrize("how", METHODS)
def test_trusted_code_runs_and_travels(how: str, own: Path, tmp_path: Path, slimlm):
    flags = (*METHODS[how], *QUICK, "--eval-text", str(tmp_path / "text.txt"), "--dataset", str(tmp_path / "text.txt"))
    code, lines = slimlm("compress", "-m", str(own), *flags, "-o", "out", "--trust-remote-code")
    assert code == 0, lines
    out = Path("out")
    assert {path.name for path in out.glob("*.py")} == {"modeling_own.py", "helpers_own.py"}
    manifest = json.loads((out / "slimlm.json").read_text())
    assert manifest["needs_remote_code"]
    assert {"code modeling_own.py", "code helpers_own.py"} <= manifest["fingerprint"].keys()
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    recipe = (out / "recipe.yaml").read_text()
    assert "trust_remote_code" not in recipe
    again = ("compress", "--recipe", "out/recipe.yaml", "-o", "again")
    code, lines = slimlm(*again)
    assert (code, len(lines)) == (2, 1)
    assert "was run with code that comes with its model: read that, then add --trust-remote-code" in lines[0]
    assert slimlm(*again, "--trust-remote-code")[0] == 0
    assert (Path("again") / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_trusted_code_is_measured_and_probed(own: Path, tmp_path: Path, slimlm):
    flags = ("-m", str(own), "--method", "magnitude", "-s", "0.5", "--eval-windows", "2", "--trust-remote-code")
    code, lines = slimlm("compress", *flags, "--dry-run", "-o", "out")
    assert code == 0, lines
    assert not Path("out").exists()


@pytest.mark.parametrize("how", ["refitted", "repaired"])
def test_a_class_with_a_stock_config_is_what_computes_on_both_sides(
    how: str, own: Path, tmp_path: Path, slimlm, monkeypatch
):
    """Its config is the stock one; nothing but the trust that was given says that the class is not."""
    configure(own, auto_map={"AutoModelForCausalLM": AUTO_MAP["AutoModelForCausalLM"]})
    (own / "modeling_own.py").write_text(OWN_CODE.replace("    config_class = OwnConfig\n", ""))
    built: list[str] = []
    make = skeleton.AutoModelForCausalLM.from_config

    def seen(*args: Any, **settings: Any) -> Any:
        built.append(type(model := make(*args, **settings)).__name__)
        return model

    monkeypatch.setattr(skeleton.AutoModelForCausalLM, "from_config", seen)
    flags = ("-m", str(own), *METHODS[how], "--dataset", str(tmp_path / "text.txt"), *QUICK, "--trust-remote-code")
    code, lines = slimlm("compress", *flags, "-o", "out")
    assert code == 0, lines
    assert set(built) == {"OwnModel"}
    assert type(AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)).__name__ == "OwnModel"


@pytest.mark.parametrize("command", [("eval", "--tasks", "none"), ("inspect",)])
def test_code_that_is_not_trusted_is_refused_by_every_command(command, llama: Path, tmp_path: Path, slimlm):
    model = shutil.copytree(llama, tmp_path / "llama")
    unknown_code(model)
    code, lines = slimlm(command[0], str(model), *command[1:])
    assert (code, len(lines)) == (2, 1), lines
    assert "--trust-remote-code" in lines[0]


@pytest.mark.parametrize(
    "text",
    [
        "trust_remote_code: true\nsteps: [{method: wanda, sparsity: 0.5}]",
        "steps: [{method: wanda, sparsity: 0.5, trust_remote_code: true}]",
    ],
)
def test_no_recipe_can_say_that_code_is_trusted(text: str, slimlm):
    Path("recipe.yaml").write_text(f"model: llama\n{text}\n")
    code, lines = slimlm("compress", "--recipe", "recipe.yaml", "--trust-remote-code")
    assert (code, len(lines)) == (2, 1)
    assert "trust_remote_code" in lines[0]
