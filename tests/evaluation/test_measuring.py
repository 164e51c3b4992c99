"""However models are measured, whole or by block, together or apart, the figures are the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.evaluation import measuring
from slimlm.evaluation.evaluate import Evaluation, evaluate

FEW = {"tasks": (), "num_windows": 7, "window": 48, "batch_size": 3, "generate": 0}


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model with a weaker block."""
    path = tmp_path_factory.mktemp("model")
    model = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"])
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(0.5)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(BUNDLED["llama"]).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def together(halved: str) -> Evaluation:
    return evaluate(halved, "llama", **FEW)


def without_how(models: list[dict]) -> list[dict]:
    return [{**entry, "streamed": None, "seconds": 0} for entry in models]


def test_by_block_it_is_the_same_pair(halved: str, together: Evaluation):
    streamed = evaluate(halved, "llama", stream=True, **FEW)
    assert [entry["streamed"] for entry in streamed.models] == [True, True]
    assert without_how(streamed.models) == without_how(together.models)
    assert streamed.pairs == together.pairs


def test_a_pair_without_room_goes_by_block(halved: str, together: Evaluation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, "has_no_room", lambda paths, *_: len(paths) > 1)
    monkeypatch.setattr(measuring, "load_model", lambda *_: pytest.fail("loaded as a whole"))
    assert evaluate(halved, "llama", **FEW).pairs == together.pairs


def test_what_cannot_be_streamed_is_measured_apart(halved: str, together: Evaluation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, "has_no_room", lambda paths, *_: len(paths) > 1)
    monkeypatch.setattr(measuring, "is_streamable", lambda *_: False)
    apart = evaluate(halved, "llama", **FEW)
    assert without_how(apart.models) == without_how(together.models)
    for name, change in apart.pairs[0]["texts"].items():
        assert "kl" not in change
        assert {**together.pairs[0]["texts"][name], **change} == together.pairs[0]["texts"][name]


def test_the_dense_model_is_loaded_once(halved: str, monkeypatch: pytest.MonkeyPatch):
    loaded = []
    load = measuring.load_model
    monkeypatch.setattr(measuring, "load_model", lambda path, settings: loaded.append(path) or load(path, settings))
    evaluate(halved, "llama", **{**FEW, "generate": 3})
    assert loaded == [Path(halved), BUNDLED["llama"]]


def test_a_text_is_worth_its_bits(together: Evaluation):
    """Bits a byte times bytes are the bits of the whole text."""
    text = together.models[0]["texts"]["python-reference"]
    bits = text["log_perplexity"] / 0.6931471805599453 * 7 * 47
    assert 7 * 47 * 1.5 < bits / text["bits_per_byte"] < 7 * 47 * 6  # bytes, at so many a token
