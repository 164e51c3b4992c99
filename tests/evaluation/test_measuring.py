"""However models are measured, whole or by block, together or apart, the figures are the same."""

import shutil
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


@pytest.mark.parametrize("pairs_fit", [True, False])
def test_several_models_are_measured_in_one_way(halved: str, pairs_fit: bool, tmp_path: Path, monkeypatch):
    """Whatever is in memory already when the second one's turn comes."""
    other = shutil.copytree(halved, tmp_path / "other")
    asked: list[int] = []

    def has_no_room(paths: list[Path], *_: object) -> bool:
        asked.append(len(paths))
        assert not measuring_began, "asked again, with models in memory"
        return len(paths) > 1 and not pairs_fit

    measuring_began: list[Path] = []
    load = measuring.load_model
    monkeypatch.setattr(measuring, "has_no_room", has_no_room)
    monkeypatch.setattr(measuring, "load_model", lambda path, how: measuring_began.append(path) or load(path, how))
    found = evaluate([halved, str(other)], "llama", **{**FEW, "generate": 3})
    assert [entry["streamed"] for entry in found.models] == [not pairs_fit] * 3
    assert asked
    first, second = found.pairs
    assert {**first, "model": None} == {**second, "model": None}
    assert all(entry["generation"] for entry in found.models)  # each by itself there is room for
    assert found.data["notes"] == []
    surprise = found.models[0]["generation"]["sampled"]["surprise"]
    assert (surprise is not None) == pairs_fit  # the dense model is not beside


def test_what_does_not_fit_at_all_writes_nothing_and_says_so(halved: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, "has_no_room", lambda *_: True)
    monkeypatch.setattr(measuring, "load_model", lambda *_: pytest.fail("loaded as a whole"))
    found = evaluate(halved, "llama", **{**FEW, "generate": 3})
    assert found.models[0]["generation"] is found.pairs[0]["generation"] is None
    assert found.data["notes"] == ["models write nothing: they go by block"]


def test_what_cannot_be_streamed_is_measured_apart(halved: str, together: Evaluation, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, "has_no_room", lambda paths, *_: len(paths) > 1)
    monkeypatch.setattr(measuring, "is_streamable", lambda *_: False)
    apart = evaluate(halved, "llama", **FEW)
    assert without_how(apart.models) == without_how(together.models)
    for name, change in apart.pairs[0]["texts"].items():
        assert "kl" not in change
        assert {**together.pairs[0]["texts"][name], **change} == together.pairs[0]["texts"][name]
    assert apart.data["notes"] == ["no KL: models could not be had side by side, or have other vocabularies"]


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
