import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.errors import UserError
from slimlm.evaluation import sources
from slimlm.evaluation.evaluate import evaluate
from slimlm.evaluation.sources import default_texts, load_text, python_reference, python_sources
from slimlm.evaluation.text import load_test_windows

ROWS = ["", " = Heading = \n", *[" ".join(text.split()[:150]) + "\n" for text in python_reference()[:40]], ""]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["llama"])


def reference_perplexity(length: int) -> float:
    """As GPTQ's and SparseGPT's scripts take it: join, tokenise, cut, mean over windows of each one's mean loss."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"], dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(BUNDLED["llama"])("\n\n".join(ROWS), return_tensors="pt").input_ids
    losses = []
    for number in range(tokens.shape[1] // length):
        batch = tokens[:, number * length : (number + 1) * length]
        with torch.no_grad():
            logits = model(batch).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        losses.append(loss.double() * length)
    return math.exp(float(torch.stack(losses).sum()) / (len(losses) * length))


@pytest.fixture
def wikitext(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "_fetched", lambda name, where: iter(ROWS))


def test_wikitext2_is_measured_as_papers_do(wikitext):
    data = evaluate("llama", tasks=(), text="wikitext2", window=256, dtype="float32", generate=0).data
    found = data["models"][0]["texts"]["wikitext2"]["perplexity"]
    assert found == pytest.approx(reference_perplexity(256), rel=1e-4)
    assert data["texts"][0]["bos"] is None


def test_papers_texts_take_all_windows_of_2048_tokens_or_the_context(wikitext):
    data = evaluate("llama", tasks=(), text="wikitext2", generate=0, batch_size=2).data
    assert data["texts"][0]["window"] == 1024  # the context
    tokens = AutoTokenizer.from_pretrained(BUNDLED["llama"])("\n\n".join(ROWS)).input_ids
    assert data["texts"][0]["windows"] == len(tokens) // 1024


def test_c4_is_the_first_256_windows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "_fetched", lambda name, where: iter(ROWS))
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    windows = load_test_windows("c4", tokenizer, None, 16).tokens
    assert windows.flatten().tolist() == tokenizer(" ".join(ROWS)).input_ids[: 256 * 16]


def test_what_cannot_be_fetched_is_one_line_that_says_what_needs_no_network(tokenizer):
    with pytest.raises(UserError, match="text 'wikitext2' could not be fetched .*python-reference") as caught:
        load_text("wikitext2", tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("wikitxt2", "neither a file nor one of .*did you mean 'wikitext2'"), ("no/such.txt", "there is no such file")],
)
def test_an_unknown_text_is_one_line(tokenizer, name: str, message: str):
    with pytest.raises(UserError, match=message):
        load_text(name, tokenizer)


def test_a_file_of_that_name_comes_first(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("wikitext2").write_text("mine")
    assert load_text("wikitext2", tokenizer).documents == ["mine"]


def test_text_comes_from_whatever_calibration_data_is_read_from_in_its_order(tokenizer, tmp_path: Path):
    documents = ["one", "two", "three"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"text\none\ntwo\nthree\n"))
    (tmp_path / "notes.md").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\nthree")
    for name in ("rows.jsonl", "rows.csv.gz", "notes.md"):
        assert load_text(str(tmp_path / name), tokenizer).documents == documents


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.jsonl", b'{"text": ', "test file .*rows.jsonl cannot be read: line 1 is not JSON"),
        ("chats.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "test data .* has no chat template"),
        ("tokens.jsonl", b'{"input_ids": [1, 2]}', "test file .* holds tokens, and what is measured are texts"),
        ("notes.md", b"caf\xe9", "test text .*notes.md: it is not UTF-8 text"),
        ("notes.md", b"\n", "test text .*notes.md is empty"),
    ],
)
def test_a_text_that_cannot_be_read_is_one_line(tokenizer, tmp_path: Path, name: str, data: bytes, message: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        load_text(str(tmp_path / name), tokenizer)
    assert "\n" not in str(caught.value)


def test_the_default_texts_are_of_two_kinds():
    assert default_texts() == ("python-reference", "python-sources")
    assert len(python_sources()) > 30
    assert sum("def " in text for text in python_sources()) > 30


def test_a_python_without_its_sources_has_one_text(tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MODULES", ())
    assert default_texts() == ("python-reference",)
    with pytest.raises(UserError, match="python-sources.*without it"):
        load_text("python-sources", tokenizer)
