"""What an earlier run measured of the dense model is as good as the model, and refused where measured otherwise."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.cli import main
from slimlm.errors import UserError
from slimlm.evaluation import earlier, measuring
from slimlm.evaluation.earlier import require_same
from slimlm.evaluation.evaluate import Evaluation, evaluate
from slimlm.evaluation.samples import recomputed
from slimlm.settings import EvalSettings
from tests.conftest import CONFIGS, build_tiny
from tests.evaluation.test_task_errors import task

TEMPLATE = "{{ bos_token }}{% for turn in messages %}{{ turn.content }} {% endfor %}"
WORDS = "One text of a few words that is long enough for three windows, and some more of it. " * 12
OF_LOGITS = {"kl", "same_top"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a dense model and a smaller one."""
    place = tmp_path_factory.mktemp("earlier")
    shutil.copytree(BUNDLED["llama"], place / "dense")
    build_tiny(CONFIGS["llama"], place / "small")
    for name in ("dense", "small"):
        (place / name / "chat_template.jinja").write_text(TEMPLATE)
    (place / "text.txt").write_text(WORDS)
    (place / "other.txt").write_text(WORDS.upper())
    return place


@pytest.fixture(scope="module")
def how(place: Path) -> dict[str, Any]:
    few = {"num_windows": 3, "window": 32, "generate": 6, "limit": 8, "dtype": "float32", "corrupt": ("typos",)}
    return few | {"text": (str(place / "text.txt"),)}


@pytest.fixture(scope="module")
def direct(place: Path, how: dict[str, Any]) -> Evaluation:
    return evaluate(str(place / "small"), str(place / "dense"), fragile=2, log_samples=place / "pair", **how)


@pytest.fixture(scope="module")
def kept(place: Path, how: dict[str, Any]) -> Path:
    evaluate(str(place / "dense"), log_samples=place / "kept", **how)
    return place / "kept"


def without_logits(pair: dict[str, Any]) -> dict[str, Any]:
    texts = {
        name: {key: value for key, value in change.items() if key not in OF_LOGITS}
        for name, change in pair["texts"].items()
    }
    own = {key: value for key, value in pair["generation"].items() if key != "collapsed"}
    return {**pair, "texts": texts, "generation": own}


@pytest.mark.parametrize("name", ["kept", "pair", "pair/models/1"])
def test_what_changed_is_what_a_direct_run_says_to_every_digit(
    name: str, place: Path, how: dict[str, Any], direct: Evaluation, kept: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded: list[Path] = []
    load = measuring.load_model
    monkeypatch.setattr(measuring, "load_model", lambda path, settings: loaded.append(path) or load(path, settings))
    found = evaluate(str(place / "small"), str(place / name), fragile=2, **how)
    assert loaded == [place / "small"]
    assert direct.pairs[0]["texts"][f"{place}/text.txt+typos"].keys() >= OF_LOGITS
    assert found.pairs == [without_logits(found.pairs[0]) | {"generation": found.pairs[0]["generation"]}]
    assert without_logits(found.pairs[0]) == without_logits(direct.pairs[0])
    assert found.pairs[0]["fragile"]["tasks"]["python_reference_continuation"]
    for own, other in zip(found.models, direct.models, strict=True):
        for key in ("name", "texts", "tasks", "bytes", "task_samples"):
            assert own[key] == other[key]
    (note,) = found.data["notes"]
    assert "dense is taken from samples, which hold no logits: no KL, no same top token" in note
    assert direct.data["notes"] == []


def test_samples_of_a_pair_with_an_earlier_dense_model_are_whole(
    place: Path, how: dict[str, Any], kept: Path, tmp_path: Path
):
    found = evaluate(str(place / "small"), str(kept), log_samples=tmp_path / "again", **how)
    assert json.loads(json.dumps(found.pairs)) == json.loads(json.dumps(recomputed(tmp_path / "again")["pairs"]))


CHANGED: dict[str, tuple[Any, str]] = {
    "tasks": ((), "--tasks"),
    "text": (("other.txt",), "--text"),
    "num_windows": (2, "--num-windows"),
    "window": (16, "--window"),
    "corrupt": (("case",), "--corrupt"),
    "batch_size": (2, "--batch-size"),
    "limit": (4, "--limit"),
    "num_fewshot": (1, "--num-fewshot"),
    "apply_chat_template": (True, "--apply-chat-template"),
    "system_instruction": ("Be\nbrief.", "--system-instruction"),
    "gen_kwargs": ("temperature=0", "--gen-kwargs"),
    "seed": (1, "--seed"),
    "generate": (5, "--generate"),
    "dtype": ("bfloat16", "--dtype"),
    "device": ("auto", "device"),  # which the test says is another
}
NOT_DECIDING = {
    "model", "revision", "against", "against_revision",  # what is measured, not how
    "fragile", "log_samples", "progress",  # what is said of it, and where
    "token", "cache_dir", "trust_remote_code",  # how a model is had
    "stream", "device_map",  # which give the same figures
}  # fmt: skip


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "load_model", lambda *_: pytest.fail("loaded"))


def test_every_setting_is_known_to_decide_or_not_to():
    assert CHANGED.keys() | NOT_DECIDING == {field.name for field in fields(EvalSettings)} - {"_"}
    assert not CHANGED.keys() & NOT_DECIDING


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_that_differs_is_named_with_both_values(
    name: str, place: Path, how: dict[str, Any], kept: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
):
    value, flag = CHANGED[name]
    if name == "text":
        value = tuple(str(place / one) for one in value)
    if name == "device":
        monkeypatch.setattr(earlier, "device_name", lambda device: "another")
    with pytest.raises(UserError, match=f"kept was measured otherwise, .*: (.*; )?{flag} was .*, is now ") as caught:
        evaluate(str(place / "small"), str(kept), **how | {name: value})
    assert "\n" not in str(caught.value)
    named = {part.partition(" was ")[0] for part in str(caught.value).partition("with: ")[2].split("; ")}
    assert named & {one for _, one in CHANGED.values()} == {flag}


def test_every_condition_is_named_where_it_differs(kept: Path, place: Path):
    conditions = json.loads((kept / "evaluation.json").read_text())["conditions"]
    assert {"tokenizer", "chat template", "prompts", "version of torch", "version of lm_eval"} < conditions.keys()
    assert {f"text {place}/text.txt+typos", "questions of python_reference_continuation"} < conditions.keys()
    for name in conditions:
        for there, here in ((conditions, {**conditions, name: "other"}), ({**conditions, name: "other"}, conditions)):
            with pytest.raises(UserError) as caught:
                require_same(there, here, "kept")
            pair = [json.dumps(one) for one in (there[name], here[name])]
            assert str(caught.value).endswith(f"with: {name} was {pair[0]}, is now {pair[1]}")
        less = {key: one for key, one in conditions.items() if key != name}
        if name == "prompts":  # a run by block writes nothing
            require_same(conditions, less, "kept")
            continue
        with pytest.raises(UserError, match="is now not there"):
            require_same(conditions, less, "kept")
    require_same(conditions, dict(conditions), "kept")


def test_windows_are_as_long_as_those_of_the_earlier_run_unless_told_otherwise(
    place: Path, how: dict[str, Any], kept: Path
):
    found = evaluate(str(place / "small"), str(kept), **how | {"window": None, "fragile": 0})
    assert {text["window"] for text in found.data["texts"]} == {32}


def test_samples_go_with_models_that_go_by_block(place: Path, how: dict[str, Any], tmp_path: Path):
    texts = {**how, "tasks": (), "corrupt": None}
    evaluate(str(place / "dense"), log_samples=tmp_path / "whole", **texts)
    evaluate(str(place / "dense"), log_samples=tmp_path / "by-block", stream=True, **texts)
    direct = evaluate(str(place / "small"), str(place / "dense"), stream=True, **texts)
    for name, stream in (("whole", True), ("by-block", False), ("by-block", True)):
        (pair,) = evaluate(str(place / "small"), str(tmp_path / name), stream=stream, **texts).pairs
        change = pair["texts"][f"{place}/text.txt"]["log_perplexity_change"]
        assert change == pytest.approx(direct.pairs[0]["texts"][f"{place}/text.txt"]["log_perplexity_change"], abs=1e-6)


def test_what_only_tasks_read_is_not_compared_without_them(place: Path, how: dict[str, Any], tmp_path: Path):
    texts = {**how, "tasks": (), "corrupt": None, "generate": 0}
    evaluate(str(place / "dense"), log_samples=tmp_path / "kept", **texts)
    same = {"limit": 3, "seed": 0, "batch_size": 8, "num_fewshot": 1, "gen_kwargs": "temperature=0"}
    assert evaluate(str(place / "small"), str(tmp_path / "kept"), **texts | same).pairs


def test_another_text_of_the_same_name_is_another(place: Path, how: dict[str, Any], kept: Path, no_work: None):
    file = place / "text.txt"
    file.write_text(WORDS.lower())
    with pytest.raises(UserError, match=r"with: text \S+/text.txt was \S+, is now \S+; text \S+/text.txt\+typos was"):
        evaluate(str(place / "small"), str(kept), **how)
    file.write_text(WORDS)


def test_another_tokenizer_or_template_is_named(place: Path, how: dict[str, Any], kept: Path, tmp_path: Path):
    shutil.copytree(place / "small", tmp_path / "small")
    settings = json.loads((tmp_path / "small/tokenizer_config.json").read_text())
    (tmp_path / "small/tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<other>"}))
    with pytest.raises(UserError, match=r"with: tokenizer was \S+, is now \S+$"):
        evaluate(str(tmp_path / "small"), str(kept), **how)
    chats = {**how, "apply_chat_template": True, "tasks": (), "corrupt": None}
    evaluate(str(place / "dense"), log_samples=tmp_path / "chats", **chats)
    (tmp_path / "small/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "small/chat_template.jinja").write_text(TEMPLATE.replace("turn.content", "turn.content | upper"))
    with pytest.raises(UserError, match=r"with: chat template was \S+, is now \S+; prompts was \S+, is now \S+$"):
        evaluate(str(tmp_path / "small"), str(tmp_path / "chats"), **chats)


def test_questions_count_and_not_where_their_files_lie(place: Path, how: dict[str, Any], tmp_path: Path):
    few = {**how, "corrupt": None, "generate": 0, "limit": None}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    file = task(tmp_path / "a")
    evaluate(str(place / "dense"), tasks=(file,), log_samples=tmp_path / "kept", **few)
    moved = Path(shutil.copy(file, tmp_path / "b"))
    assert evaluate(str(place / "small"), str(tmp_path / "kept"), tasks=(str(moved),), **few).pairs[0]["tasks"]
    moved.write_text(moved.read_text().replace("doc_to_text: ", "doc_to_text: Q "))
    with pytest.raises(UserError, match=r"with: questions of \S+ was \S+, is now \S+$"):
        evaluate(str(place / "small"), str(tmp_path / "kept"), tasks=(str(moved),), **few)
    rows = tmp_path / "a/data.jsonl"
    rows.write_text(rows.read_text().replace("number", "figure"))
    with pytest.raises(UserError, match=r"with: questions of \S+ was \S+, is now \S+$"):
        evaluate(str(place / "small"), str(tmp_path / "kept"), tasks=(file,), **few)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def turned(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("spoil", [Path.unlink, cut, turned, lambda file: file.write_bytes(b"[]")])
def test_samples_that_are_not_whole_are_one_line(
    spoil: Callable[[Path], None], kept: Path, how: dict[str, Any], place: Path, no_work: None, tmp_path: Path
):
    files = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file())
    assert {path.name for path in files} > {"tokens.safetensors", "questions-0.jsonl", "continuations.jsonl"}
    for file in files:
        if spoil is turned and file.name == "evaluation.json":
            continue  # a digit of a figure would be another figure
        copy = Path(shutil.copytree(kept, tmp_path / "copy", dirs_exist_ok=True))
        spoil(copy / file)
        with pytest.raises(UserError, match="copy holds no whole samples: ") as caught:
            evaluate(str(place / "small"), str(copy), **how)
        assert "\n" not in str(caught.value)
        assert file.name == "evaluation.json" or file.name in str(caught.value)
        shutil.rmtree(copy)


@pytest.mark.parametrize("message", ["was measured otherwise", "holds no whole samples"])
def test_the_command_says_so_in_a_line_and_ends_with_2(
    message: str, place: Path, kept: Path, no_work: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    shutil.copytree(kept, tmp_path / "kept")
    if message == "holds no whole samples":
        (tmp_path / "kept/tokens.safetensors").unlink()
    words = ["eval", str(place / "small"), "--against", str(tmp_path / "kept"), "--tasks", "none", "--quiet"]
    monkeypatch.setattr("sys.argv", ["slimlm", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_which_of_several_models_is_meant_has_to_be_said(place: Path, how: dict[str, Any], tmp_path: Path, kept: Path):
    few = {**how, "tasks": (), "generate": 0}
    evaluate([str(place / "dense"), str(place / "small")], log_samples=tmp_path / "two", **few)
    with pytest.raises(UserError, match="samples of 2 models: name one, as in .*two/models/0"):
        evaluate(str(place / "small"), str(tmp_path / "two"), **few)
    with pytest.raises(UserError, match="samples of 2 models, and none of number 2"):
        evaluate(str(place / "small"), str(tmp_path / "two/models/2"), **few)
    with pytest.raises(UserError, match="leave out --against-revision"):
        evaluate(str(place / "small"), str(kept), against_revision="main", **few)
    first = evaluate(str(place / "small"), str(tmp_path / "two/models/0"), **few)
    assert first.pairs[0]["against"] == str(place / "dense")
