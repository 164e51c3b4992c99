"""Standard input, what is meant of a dataset, and what is said of the parts of a mixture."""

import hashlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from slimlm.calibration import Windows, interleaved, load_windows
from slimlm.calibration import sources as module
from slimlm.checkpoint.resolve import BUNDLED
from slimlm.errors import UserError
from slimlm.evaluation.text import TestWindows
from slimlm.recipe import Meant, one_step, recipe_of_flags
from slimlm.stages import compress
from slimlm.windows import also_calibrated, calibration_windows
from tests.calibration.test_windows import DOCUMENTS
from tests.conftest import random_tokens


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["llama"])


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch):
    def pipe(data: bytes, terminal: bool = False) -> None:
        module._piped.cache_clear()
        stream = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: terminal)
        monkeypatch.setattr(sys, "stdin", stream)

    yield pipe
    module._piped.cache_clear()


@pytest.mark.parametrize(
    "data",
    [
        "\n<|endoftext|>\n".join(DOCUMENTS),
        "\r\n".join(json.dumps({"text": text}) for text in DOCUMENTS),
        "\ufeff" + json.dumps([{"text": text} for text in DOCUMENTS]),
    ],
    ids=["text", "rows", "list"],
)
def test_standard_input_is_what_the_same_text_in_a_file_is(tmp_path: Path, tokenizer, piped, data: str):
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    piped(data.encode())
    expected = load_windows(str(tmp_path / "text.txt"), tokenizer, 4, 32, seed=3)
    for _ in range(2):  # whoever asks again gets it again
        found = load_windows("-", tokenizer, 4, 32, seed=3)
        assert torch.equal(found.tokens, expected.tokens)
    assert found.parts[0]["documents"] == expected.parts[0]["documents"]


@pytest.mark.parametrize(
    ("data", "terminal", "message"),
    [
        (b" \n", False, "standard input is empty"),
        (b'{"text": "a"}\n{"text": ', False, "standard input cannot be read as JSON: line 2 is not JSON"),
        (b"caf\xe9", False, "standard input cannot be read as text: it is not UTF-8 text: byte 3"),
        (b"", True, "nothing is piped in"),
    ],
)
def test_what_is_wrong_with_standard_input_is_said(tokenizer, piped, data: bytes, terminal: bool, message: str):
    piped(data, terminal)
    with pytest.raises(UserError, match=message):
        load_windows("-", tokenizer, 4, 32)


def test_several_processes_do_not_read_standard_input(tokenizer, piped, monkeypatch: pytest.MonkeyPatch):
    piped(b"text")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes cannot all read standard input"):
        load_windows("-", tokenizer, 4, 32)


def test_a_dataset_of_the_hub_is_asked_for_as_it_is_meant(tokenizer, monkeypatch: pytest.MonkeyPatch):
    asked: list[dict] = []

    def load_dataset(**where):
        asked.append(where)
        return Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    load_windows("me/data", tokenizer, 2, 16)
    load_windows("me/data", tokenizer, 2, 16, meant=Meant(None, "en", "validation", "v1"))
    load_windows("wikitext2", tokenizer, 2, 16, meant=Meant(split="validation"))
    assert asked == [
        {"path": "me/data", "split": "train", "streaming": True},
        {"path": "me/data", "name": "en", "split": "validation", "revision": "v1", "streaming": True},
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "validation", "streaming": True},
    ]


def test_the_split_of_a_saved_dataset_is_the_one_that_is_meant(tmp_path: Path, tokenizer):
    train, test = Dataset.from_dict({"text": DOCUMENTS[:9]}), Dataset.from_dict({"text": DOCUMENTS[9:]})
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    train.save_to_disk(tmp_path / "single")
    test.save_to_disk(tmp_path / "only_test")

    def windows(name: str, **hub: str):
        step = one_step(model="llama", sparsity=0.2, dataset=str(tmp_path / name), max_seq_length=16,
                        num_calibration_samples=2, **hub).steps[0]  # fmt: skip
        return calibration_windows(step, tokenizer, 10**9)

    expected = load_windows(str(tmp_path / "only_test"), tokenizer, 2, 16).tokens
    assert torch.equal(windows("saved", dataset_split="test").tokens, expected)
    assert not torch.equal(windows("saved").tokens, expected)
    with pytest.raises(UserError, match=r"no split 'tst'; did you mean 'test'\? \(it has: train, test\)"):
        windows("saved", dataset_split="tst")
    with pytest.raises(UserError, match="has no splits: leave out --dataset-split"):
        windows("single", dataset_split="train")
    with pytest.raises(UserError, match="--dataset-config is for datasets from the hub, and .*saved is none"):
        windows("saved", dataset_config="en", dataset_split="test")
    (tmp_path / "text.txt").write_text(DOCUMENTS[0])
    step = {"model": "llama", "sparsity": 0.2, "max_seq_length": 16, "num_calibration_samples": 4}
    for sources in ("{saved}:0.5,{text}:0.5", "{text}:0.5,{saved}:0.5"):
        dataset = sources.format(saved=tmp_path / "saved", text=tmp_path / "text.txt")
        both = recipe_of_flags({**step, "dataset": dataset, "dataset_split": "test"}).steps[0]
        assert len(calibration_windows(both, tokenizer, 10**9).tokens) == 4
    with pytest.raises(UserError, match="--dataset-split is for datasets from the hub, and .*text.txt is none"):
        windows("text.txt", dataset_split="test")


def test_parts_are_told_apart_and_add_up():
    one, two = torch.arange(24).view(6, 4), torch.arange(100, 112).view(3, 4)
    both = interleaved([Windows(one, "a", 0, documents={"a": 5}), Windows(two, "self", 0)])
    assert [(part["source"], part["documents"], part["windows"], part["tokens"]) for part in both.parts] == [
        ("a", 5, 6, 24),
        ("self", 3, 3, 12),
    ]
    assert [part["sha256"] for part in both.parts] == [Windows(each, "", 0).sha256 for each in (one, two)]
    digest = hashlib.sha256(repr((6, 4)).encode() + numpy.arange(24, dtype=numpy.int64).tobytes()).hexdigest()
    assert both.parts[0]["sha256"] == digest


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 6), st.integers(0, 2**32))
def test_documents_that_are_in_both_are_counted(shared: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 1000, (6, 40), generator=generator)
    other = torch.randint(1000, 2000, (8, 40), generator=generator)
    calibration = torch.cat([other, tokens[:shared], tokens[shared:].flip(1)])  # in another order they are others
    documents = torch.arange(6)[:, None].expand(6, 40)
    test = TestWindows(tokens, "test", 0, documents, torch.ones_like(tokens))
    assert also_calibrated(test, Windows(calibration, "given", 0)) == shared


def test_a_run_says_what_it_is_calibrated_and_measured_on(tiny_llama: Path, tmp_path: Path, caplog):
    lines = [" ".join(map(str, row.tolist())) for row in random_tokens(40, 24)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(lines))
    (tmp_path / "test.txt").write_text("\n<|endoftext|>\n".join([*lines[:4], "0 1 2 3 " * 60]))
    recipe = one_step(
        model=str(tiny_llama), sparsity=0.3, dataset=str(tmp_path / "text.txt"),
        eval_text=str(tmp_path / "test.txt"), max_seq_length=24, eval_windows=8, output_dir=str(tmp_path / "out"),
        self_share=0.25, refine=0,
    )  # fmt: skip
    manifest = compress(recipe).manifest
    given, own = manifest["calibration"]["parts"]
    assert (given["documents"], own["source"]) == (40, "self")
    assert given["tokens"] == 24 * given["windows"]
    assert manifest["measured"]["documents"] >= manifest["measured"]["also_calibrated"] > 0
    assert "documents to measure on are in the calibration text, too" in caplog.text
