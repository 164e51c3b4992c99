from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.evaluation.text import load_test_windows

DOCUMENTS = ["Grüße aus Köln, 10 € — «très bien»! 漢字 🙂🙂\n\n  indented\ttext", "plain words only " * 30, "x"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["llama"])


def test_bytes_of_tokens_add_up_to_the_documents(tokenizer, tmp_path: Path):
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    windows = load_test_windows(str(tmp_path / "text.txt"), tokenizer, None, 2)
    for index, document in enumerate(DOCUMENTS[:2]):
        size = int(windows.lengths[windows.documents == index].sum())
        assert size == len(document.strip("\n").encode())


def test_each_token_knows_its_document(tokenizer, tmp_path: Path):
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS[::-1]), encoding="utf-8")
    windows = load_test_windows(str(tmp_path / "text.txt"), tokenizer, None, 2)
    starts = windows.tokens.flatten() == windows.bos
    assert torch.equal(windows.documents.flatten(), starts.cumsum(0) - 1)
    assert not windows.lengths.flatten()[starts].any()


def test_picked_windows_keep_their_documents(tokenizer):
    everything, some = (load_test_windows(None, tokenizer, count, 64) for count in (None, 10))
    places = torch.arange(10) * len(everything.tokens) // 10
    for part in ("tokens", "documents", "lengths"):
        assert torch.equal(getattr(some, part), getattr(everything, part)[places])


def test_corrupted_windows_say_so(tokenizer):
    clean, typos = (load_test_windows(None, tokenizer, 4, 64, how) for how in (None, "typos"))
    assert typos.source == f"{clean.source} with typos"
    assert typos.name == "python-reference+typos"
    assert not torch.equal(clean.tokens, typos.tokens)
