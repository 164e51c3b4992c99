import json
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from slimlm.calibration import Windows, interleaved, load_windows, sample, sample_windows, split_documents
from slimlm.calibration.openings import OPENINGS
from slimlm.calibration.sample import least_repeated
from slimlm.checkpoint.resolve import BUNDLED
from slimlm.errors import UserError

DOCUMENTS = [
    f"Document number {number}. " + "The quick brown fox jumps over the lazy dog. " * 12 for number in range(20)
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["llama"])


def write(path: Path, kind: str) -> Path:
    file = path / f"text.{kind}"
    if kind == "txt":
        file.write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    elif kind == "jsonl":
        file.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in DOCUMENTS))
    else:
        from datasets import Dataset

        Dataset.from_dict({"text": DOCUMENTS}).to_parquet(str(file))
    return file


def test_every_file_format_of_the_same_documents_gives_the_same_windows(tmp_path: Path, tokenizer):
    hashes = {
        load_windows(str(write(tmp_path, kind)), tokenizer, 4, 32, seed=3).sha256
        for kind in ("txt", "jsonl", "parquet")
    }
    assert len(hashes) == 1


def test_a_saved_dataset_gives_the_same_tokens_in_its_own_order(tmp_path: Path, tokenizer):
    from datasets import Dataset

    Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(tmp_path / "saved"))
    windows = load_windows(str(tmp_path / "saved"), tokenizer, 3, 16)
    assert windows.tokens.shape == (3, 16)


def test_seeds_decide_and_windows_do_not_overlap(tmp_path: Path, tokenizer):
    file = str(write(tmp_path, "txt"))
    first, again, other = (load_windows(file, tokenizer, 4, 32, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert torch.equal(first.tokens, again.tokens)
    assert first.tokens.shape == (4, 32)
    assert first.bos == 0


def test_all_the_text_is_used_once_when_everything_is_asked_for(tmp_path: Path, tokenizer):
    windows = load_windows(str(write(tmp_path, "txt")), tokenizer, 10_000, 8)
    expected = sum(
        1 + len(tokenizer(text, add_special_tokens=False).input_ids)
        for text in split_documents("\n<|endoftext|>\n".join(DOCUMENTS))
    )
    assert windows.tokens.shape[0] == expected // 8
    assert (windows.tokens == 0).sum() in (len(DOCUMENTS), len(DOCUMENTS) - 1)


def test_pretokenised_data_is_taken_as_it_is(tmp_path: Path, tokenizer):
    tokens = numpy.arange(60).reshape(6, 10)
    numpy.save(tmp_path / "tokens.npy", tokens)
    windows = load_windows(str(tmp_path / "tokens.npy"), tokenizer, 6, 10)
    assert numpy.array_equal(windows.tokens.numpy(), tokens)
    rows = tmp_path / "tokens.jsonl"
    rows.write_text("\n".join(json.dumps({"input_ids": [0, *range(5, 20)]}) for _ in range(3)))
    assert load_windows(str(rows), tokenizer, 3, 16).tokens.tolist() == [[0, *range(5, 20)]] * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.txt", " \n\n", "is empty"),
        ("short.txt", "too short", "fewer than one window of 32"),
        ("bad.jsonl", "{not json", "cannot be read"),
        ("cols.jsonl", '{"texts": "x", "title": "y"}', r"not clear \(it has: texts, title\): pass --text-column"),
        ("list.jsonl", "[1, 2]", "line 1 is list, not an object"),
        ("bad.parquet", "PAR0", "cannot be read"),
        ("image.png", "x", "is none of"),
        ("bad.npy", "x", "not integer tokens"),
        ("empty.npy", "", "not integer tokens"),
        ("nothing.jsonl", '{"text": null}\n{"text": ""}', "is empty"),
        ("number.jsonl", '{"text": 5}', "column 'text' holds 5, not text, tokens or a chat"),
        ("strings.jsonl", '{"input_ids": ["a"]}', "not text, tokens or a chat"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, tokenizer, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_windows(str(tmp_path / name), tokenizer, 2, 32)


def test_an_array_of_anything_but_integers_is_refused(tmp_path: Path, tokenizer):
    numpy.save(tmp_path / "floats.npy", numpy.random.rand(64))
    with pytest.raises(UserError, match="float64 of 1 dimensions"):
        load_windows(str(tmp_path / "floats.npy"), tokenizer, 2, 8)


def test_wikitext_is_one_document_as_everyone_measures_it(tokenizer, monkeypatch):
    rows = [{"text": text} for text in ("", " = Title = \n", "", " First line . \n", " Second line . \n")] * 9
    monkeypatch.setattr("slimlm.calibration.sources._load_hub", lambda dataset, seed, meant: rows)
    windows = load_windows("wikitext2", tokenizer, 1000, 16)
    text = "\n\n".join(row["text"] for row in rows)
    expected = [0, *tokenizer(text, add_special_tokens=False).input_ids]
    assert windows.tokens.reshape(-1).tolist() == expected[: windows.tokens.numel()]
    assert (windows.tokens == 0).sum() == 1


def test_text_that_is_not_utf8_is_one_clear_line(tmp_path: Path, tokenizer):
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe caf\xe9")
    with pytest.raises(UserError, match="cannot be read"):
        load_windows(str(tmp_path / "latin.txt"), tokenizer, 2, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/text.txt", "does not exist"),
        ("missing.jsonl", "does not exist"),
        ("wikitxt2", "did you mean 'wikitext2'"),
        ("someone/dataset", r"someone/dataset' could not be fetched.*--dataset self"),
        ("wikitext2", "could not be fetched"),
    ],
)
def test_sources_that_are_not_there_are_one_clear_line(tokenizer, name: str, message: str):
    with pytest.raises(UserError, match=message):
        load_windows(name, tokenizer, 2, 32)


def test_a_model_samples_the_same_windows_for_the_same_seed_from_its_own_distribution(tmp_path: Path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"]).eval()
    first, again, other = (sample_windows(model, tokenizer, (33, 12), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert (first.tokens[:, 0] == 0).all()
    with torch.no_grad():
        likelihood = lambda tokens: model(tokens, labels=tokens).loss.item()  # noqa: E731
        uniform = torch.randint(0, 4096, (33, 12), generator=torch.Generator().manual_seed(0))
        assert likelihood(first.tokens) < likelihood(uniform) - 3


class Outputs(dict):
    __getattr__ = dict.__getitem__


class OlderLlama(LlamaForCausalLM):
    """As transformers' own were before 5.24, and as code that comes with a model may be."""

    def forward(self, input_ids, past_key_values=None, **kwargs):
        out = super().forward(input_ids, cache=past_key_values, **kwargs)
        return Outputs(logits=out.logits, past_key_values=out.cache)


def test_sampling_reads_what_came_before_whatever_the_model_calls_its_cache(tokenizer, monkeypatch):
    """Token by token as the whole window gives it."""
    monkeypatch.setattr(sample, "FROM_NOTHING", 1)
    monkeypatch.setattr(sample, "TEMPERATURES", (1.0,))
    for kind in (LlamaForCausalLM, OlderLlama):
        model = kind.from_pretrained(BUNDLED["llama"], dtype=torch.float32).eval()
        tokens = sample_windows(model, tokenizer, (3, 12)).tokens
        generator, expected = torch.Generator().manual_seed(0), tokens[:, :1]
        for _ in range(11):
            with torch.no_grad():
                logits = LlamaForCausalLM.forward(model, expected).logits[:, -1]
            expected = torch.cat([expected, sample.draw(logits, torch.ones(len(logits), 1), generator)], 1)
        assert torch.equal(tokens, expected)


def test_windows_of_several_sources_are_spread_evenly():
    parts = [Windows(torch.full((count, 4), number), f"source {number}", 0) for number, count in ((1, 6), (2, 3))]
    joined = interleaved(parts)
    assert joined.tokens[:, 0].tolist() == [1, 2, 1, 1, 2, 1, 1, 2, 1]
    assert joined.source == "source 1, source 2"
    assert interleaved(parts[:1]) is parts[0]


def test_the_windows_that_repeat_themselves_most_are_left_out():
    tokens = torch.stack([torch.arange(12), torch.arange(12) % 3, torch.arange(12) % 5, torch.arange(12, 24)])
    assert least_repeated(tokens, 3).tolist() == [0, 2, 3]
    assert least_repeated(tokens, 2).tolist() == [0, 3]


def test_windows_go_on_from_openings_of_many_kinds():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    model = AutoModelForCausalLM.from_pretrained(BUNDLED["llama"], dtype=torch.float32).eval()
    tokens = sample_windows(model, tokenizer, (32, 12)).tokens
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    texts = tokenizer.batch_decode(tokens[:, 1:])
    assert sum(any(text.startswith(opening[:6]) for opening in OPENINGS) for text in texts) >= 20
