import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slimlm.errors import UserError
from slimlm.evaluation import subjects
from slimlm.evaluation.evaluate import evaluate
from slimlm.evaluation.sources import load_text
from tests.conftest import CONFIGS, build_tiny

FEW = {"tasks": (), "num_windows": 2, "window": 32, "generate": 0}


def test_models_that_compute_in_other_dtypes_are_not_compared(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model", torch.float32)
    with pytest.raises(UserError, match="compute in float32 and bfloat16: add --dtype"):
        evaluate(str(path), "llama", **FEW)
    assert evaluate(str(path), "llama", dtype="float32", **FEW).pairs


def test_models_with_other_chat_templates_are_not_compared(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model", torch.bfloat16)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="different chat templates"):
        evaluate(str(path), "llama", apply_chat_template=True, **FEW)


def test_several_models_are_each_compared_with_the_dense_one(tmp_path: Path):
    paths = [build_tiny(CONFIGS["llama"], tmp_path / name, torch.bfloat16) for name in ("a", "b")]
    found = evaluate([str(path) for path in paths], "llama", **FEW)
    assert [entry["name"] for entry in found.models] == [*map(str, paths), "llama"]
    assert [(pair["model"], pair["against"]) for pair in found.pairs] == [(str(path), "llama") for path in paths]
    alone = evaluate(str(paths[1]), "llama", **FEW)
    assert found.pairs[1] == alone.pairs[0]
    assert found.models[2]["texts"] == alone.models[1]["texts"]


def test_a_model_is_not_measured_twice(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "a")
    shutil.copytree(path, tmp_path / "b")
    with pytest.raises(UserError, match="given more than once"):
        evaluate([str(path), str(tmp_path / "b"), f"{path}/"], **FEW)


def test_windows_are_no_longer_than_the_shortest_context(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    with pytest.raises(UserError, match="beyond the models' context of 128"):
        evaluate(str(path), **{**FEW, "window": 200})


def test_a_text_that_is_given_twice_is_measured_once(monkeypatch: pytest.MonkeyPatch):
    loaded = []
    monkeypatch.setattr(
        subjects, "load_text", lambda name, tokenizer: loaded.append(name) or load_text(name, tokenizer)
    )
    few = {**FEW, "text": ("python-reference", "python-reference"), "corrupt": ("case", "case")}
    found = evaluate("llama", "llama", **few)
    assert [text["name"] for text in found.data["texts"]] == ["python-reference", "python-reference+case"]
    assert loaded == ["python-reference"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"apply_chat_template": True}, "llama has no chat template: leave out --apply-chat-template"),
        ({"generate": 5000}, "--generate 5000 is beyond the models' context of 1024"),
        ({"corrupt": ("typo",)}, "--corrupt 'typo' is none of typos, drop, case; did you mean 'typos'"),
        ({"fragile": 3}, "say against which with --against"),
        ({"batch_size": "many"}, "--batch-size 'many': give a number, or `auto`"),
        ({"model": ()}, "no model is given"),
    ],
)
def test_what_cannot_be_is_one_clear_line(settings: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        evaluate(**{"model": "llama", **FEW, **settings})
    assert "\n" not in str(caught.value)


def test_prompts_that_are_read_differently_are_not_compared(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model", torch.bfloat16)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<unk>").save_pretrained(path)
    with pytest.raises(UserError, match="tokenise prompts differently.*--generate 0"):
        evaluate("llama", str(path), **{**FEW, "text": (), "generate": 4})


def test_an_empty_text_is_one_clear_line(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="empty.txt is empty"):
        evaluate("llama", **{**FEW, "text": str(tmp_path / "empty.txt")})


def test_settings_that_lm_eval_refuses_are_one_clear_line(monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: object) -> None:
        raise ValueError("Unknown\ngeneration setting")

    monkeypatch.setattr("lm_eval.simple_evaluate", refuse)
    with pytest.raises(UserError, match="tasks python_reference_continuation cannot be run so: ") as caught:
        evaluate("llama", **{**FEW, "tasks": None, "limit": 2, "gen_kwargs": "nonsense"})
    assert "\n" not in str(caught.value)


def test_what_lm_eval_prints_is_not_on_standard_output(capfd: pytest.CaptureFixture):
    evaluate("llama", **{**FEW, "tasks": None, "limit": 2, "batch_size": "auto"})
    assert capfd.readouterr().out == ""
