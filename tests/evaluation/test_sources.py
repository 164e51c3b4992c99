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

ROWS = ["", " = Heading = \n", *[" ".join(text.split()[:150]) + "\n" for text in python_reference()[:60]], ""]


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


def test_what_cannot_be_fetched_is_one_line_that_says_what_needs_no_network():
    with pytest.raises(UserError, match="text 'wikitext2' could not be fetched .*python-reference") as caught:
        load_text("wikitext2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("wikitxt2", "neither a file nor one of .*did you mean 'wikitext2'"), ("no/such.txt", "No such file")],
)
def test_an_unknown_text_is_one_line(name: str, message: str):
    with pytest.raises(UserError, match=message):
        load_text(name)


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("wikitext2").write_text("mine")
    assert load_text("wikitext2").documents == ["mine"]


def test_the_default_texts_are_of_two_kinds():
    assert default_texts() == ("python-reference", "python-sources")
    assert len(python_sources()) > 30
    assert sum("def " in text for text in python_sources()) > 30


def test_a_python_without_its_sources_has_one_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MODULES", ())
    assert default_texts() == ("python-reference",)
    with pytest.raises(UserError, match="python-sources.*without it"):
        load_text("python-sources")
