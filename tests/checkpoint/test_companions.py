"""What travels with a result's weights, and that its tokenizer is the model's."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from slimlm import compress
from slimlm.checkpoint.companions import copy_companions
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.checkpoint.tokenizer import SAMPLES, check_tokenizer, keep_tokenizer
from slimlm.errors import UserError
from slimlm.recipe import one_step
from tests.conftest import build_tiny
from tests.families.configs import family_config

TRAVEL = {
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "tekken.json"),
    *("vocab.bpe", "dict.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json", "LICENSE", "NOTICE"),
    *("LICENSE.pdf", "USE_POLICY.md", "generation_config.json", "special_tokens_map.json", "preprocessor_config.json"),
}
STAY = {
    *("config.json", "README.md", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    *("model.gguf", "consolidated.00.pth", "params.json", "optimizer.pt", "trainer_state.json", "training_args.bin"),
    *(".gitattributes", "slimlm.json", "recipe.yaml", "adapter_config.json", "flax_model.msgpack", "plot.PNG"),
    *("train.jsonl", "secrets.env", "core.1234", "nohup.out", "model.safetensors.bak", "notes.txt~"),
    *("modeling_own.py",),
}


def test_everything_travels_that_is_not_known_to_be_something_else(tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "original").mkdir()
    target.mkdir()
    for name in TRAVEL | STAY:
        (source / name).write_text("{}")
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    copy_companions(source, target)
    assert {path.name for path in target.iterdir()} == TRAVEL | {"additional_chat_templates"}
    assert (target / "additional_chat_templates" / "tools.jinja").read_text() == "x"


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "TokenizersBackend", None])
def test_a_qwen2_written_as_a_llama_has_the_same_tokens(tokenizer_class: str | None, tmp_path: Path):
    """transformers gives a Qwen2 a tokenizer class of its own, which splits digits in its own way."""
    path = build_tiny(family_config("qwen2"), tmp_path / "qwen2")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": tokenizer_class, "extra_special_tokens": ["<|extra|>"]}
    if tokenizer_class is None:
        del settings["tokenizer_class"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)
    recipe = {"model": str(path), "widths": "hidden=16", "dataset": str(tmp_path / "text.txt"), "measure": False}
    sizes = {"num_calibration_samples": 6, "max_seq_length": 32}
    result = compress(one_step(**recipe, **sizes, output_dir=str(tmp_path / "out")))
    assert json.loads((result.output_dir / "config.json").read_text())["model_type"] == "llama"
    ours, theirs = AutoTokenizer.from_pretrained(result.output_dir), AutoTokenizer.from_pretrained(path)
    for text in (*SAMPLES, "<|extra|> 12345"):
        assert ours(text).input_ids == theirs(text).input_ids
    written = json.loads((result.output_dir / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] != "TokenizersBackend"
    assert (
        written["tokenizer_class"] != "PreTrainedTokenizerFast" or "token_type_ids" not in written["model_input_names"]
    )
    assert not isinstance(written.get("extra_special_tokens"), list)


def test_files_of_a_tokenizer_that_needs_nothing_stay_as_they_are(tmp_path: Path):
    path = build_tiny(family_config("qwen3"), tmp_path / "model")
    settings = json.loads((path / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(path, target)
    (target / "config.json").write_bytes((path / "config.json").read_bytes())
    keep_tokenizer(load_tokenizer(path), target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (path / name).read_bytes()


class Stubborn:
    """A tokenizer in Python alone, which cannot be written in another form."""

    all_special_tokens: tuple[str, ...] = ()
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012
    chat_template = None
    model_input_names = ("input_ids",)

    def __call__(self, text: str, verbose: bool = True) -> "Stubborn":
        self.input_ids = [1, 2, 3]
        return self

    def decode(self, ids: list[int]) -> str:
        return ""


def test_a_tokenizer_that_cannot_be_kept_is_refused_before_the_run(tmp_path: Path):
    path = build_tiny(family_config("qwen2"), tmp_path / "model")
    with pytest.raises(UserError, match="Stubborn splits 'The old house stood "):
        check_tokenizer(path, Stubborn(), "llama")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_tokenizer_of_vocabulary_and_merges_goes_with_a_class_of_ours(name: str, tmp_path: Path):
    """What class it makes is known from the model alone, and no longer from its result."""
    path = build_tiny(family_config(name), tmp_path / "model")
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).unlink()
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)
    recipe = {"model": str(path), "widths": "hidden=16", "dataset": str(tmp_path / "text.txt"), "measure": False}
    sizes = {"num_calibration_samples": 6, "max_seq_length": 32}
    result = compress(one_step(**recipe, **sizes, output_dir=str(tmp_path / "out")))
    ours, theirs = load_tokenizer(result.output_dir), load_tokenizer(path)
    for text in SAMPLES:
        assert ours(text).input_ids == theirs(text).input_ids
