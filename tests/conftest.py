"""Tiny real models: real config classes and the bundled tokenizer, random weights, gains and biases."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from tests.shapes import check_linalg

check_linalg()  # before slimlm is imported

from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.resolve import BUNDLED
from slimlm.checkpoint.skeleton import load_config
from slimlm.evaluation import text
from slimlm.model.streamed import StreamedModel
from slimlm.probe import run_probe
from slimlm.prober import Prober
from slimlm.recipe import Recipe, Step, make_recipe
from slimlm.unasked import EPOCHS, OWN_SHARE
from tests.deprecation import HEARD

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral-tied": MistralConfig(**SIZES, tie_word_embeddings=True, sliding_window=None),
    "mistral-sliding": MistralConfig(**SIZES, sliding_window=8),
}


def in_steps(settings: dict[str, Any], *later: dict[str, Any]) -> Recipe:
    """The recipe of a first step and later ones, which share what every step has."""
    shared = {name: value for name, value in settings.items() if name in Step.model_fields and name != "method"}
    first = {name: value for name, value in settings.items() if name not in shared}
    return make_recipe({**shared, "steps": [{"method": "slice", **first}, *later]})


def build_tiny(config: PretrainedConfig, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model of `config` whose gains and biases are not the trivial ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=0.15)
    model.to(dtype).save_pretrained(path)
    AutoTokenizer.from_pretrained(BUNDLED["llama"]).save_pretrained(path)
    return path


def pytest_collection_finish() -> None:
    """What was imported stays; not to look through it at every collection saves a third of a second each."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol() -> Iterator[None]:
    with HEARD.watching():  # of fixtures of every scope, too
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def closed_forms() -> Iterator[None]:
    """Neither text of a model's own nor refinement where a test does not say so: what it knows is exact without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slimlm.unasked.EPOCHS", 0)
        patch.setattr("slimlm.unasked.OWN_SHARE", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """No machine loses its power here; processes that tests start still wait, thirty times a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def tokenised_once() -> Iterator[None]:
    """Most tests measure on the same texts with equal tokenizers: of those the tokens are remembered."""
    known: dict[tuple[object, ...], torch.Tensor] = {}

    def tokens(documents: list[str], tokenizer: PreTrainedTokenizerBase, *how: object) -> torch.Tensor:
        if not tokenizer.is_fast:
            return found(documents, tokenizer, *how)
        key = (type(tokenizer), tokenizer.backend_tokenizer.to_str(), *documents, *how)
        if key not in known:
            known[key] = found(documents, tokenizer, *how)
        return known[key].clone()

    found = text._tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_tokens", tokens)
        yield


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes without a process of their own, whose imports take longer than all that a tiny model needs."""
    monkeypatch.setattr(Prober, "__init__", lambda self: None)
    monkeypatch.setattr(Prober, "close", lambda self: None)
    monkeypatch.setattr(Prober, "owns", lambda self, places: None)
    monkeypatch.setattr(Prober, "carry_out", lambda self, asked: run_probe(asked))


@pytest.fixture
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the defaults that users have."""
    monkeypatch.setattr("slimlm.unasked.EPOCHS", EPOCHS)
    monkeypatch.setattr("slimlm.unasked.OWN_SHARE", OWN_SHARE)


@pytest.fixture(autouse=True)
def nothing_deprecated() -> Iterator[None]:
    """Fails a test in which a library says that we use something it will remove."""
    yield
    found, HEARD.ours = HEARD.ours, []
    assert not found, found


@pytest.fixture(params=sorted(CONFIGS))
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Each tiny model in turn."""
    return build_tiny(CONFIGS[request.param], tmp_path / request.param)


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    return build_tiny(CONFIGS["llama"], tmp_path / "llama")


def stream(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> StreamedModel:
    return StreamedModel(Checkpoint(path), load_config(path), device, dtype)


def random_tokens(count: int = 5, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 4096, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(path: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What stock transformers says."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()(tokens).logits


def on_tokens(model: Path, place: Path) -> dict[str, Any]:
    """Settings of a recipe that calibrates a model on a few windows of tokens, everything in one place."""
    numpy.save(place / "tokens.npy", random_tokens(20, 24).numpy())
    return {
        "model": str(model), "dataset": str(place / "tokens.npy"), "num_calibration_samples": 20,
        "max_seq_length": 24, "eval_windows": 2, "output_dir": str(place / "out"),
    }  # fmt: skip
