"""Errors of lm-eval, its tasks' files and what these need: one line each, that says what is wrong."""

import json
from pathlib import Path

import pytest

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.errors import UserError
from slimlm.evaluation.evaluate import evaluate
from slimlm.evaluation.harness import load_task_manager
from slimlm.evaluation.task_errors import loading_error, running_error

TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{text}"
doc_to_choice: "{choice}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: {metric}}}]
"""


def task(path: Path, text: str = "{{asked}}", choice: str = "{{choices}}", metric: str = "acc") -> str:
    rows = [{"asked": f"number {number}", "choices": ["one", "two"], "answer": number % 2} for number in range(3)]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = path / "mine.yaml"
    file.write_text(TASK.format(data=path / "data.jsonl", text=text, choice=choice, metric=metric))
    return str(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "{{nothing}}"}, "a template of it names what its data does not have: 'nothing' is undefined"),
        ({"choice": "{{choices}} {{nothing}}"}, "a template of it names what its data does not have"),
        ({"text": "{{asked"}, "a template of it is broken: unexpected end of template"),
        ({"metric": "nonsense"}, "names a metric, filter or the like that lm-eval does not know"),
    ],
)
def test_what_is_wrong_with_a_task_is_said(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        load_task_manager((task(tmp_path, **settings),))
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_examples_than_there_are_are_named(tmp_path: Path):
    few = {"num_windows": 1, "window": 8, "generate": 0}
    with pytest.raises(UserError, match="--num-fewshot 50: a split of .*mine.yaml .* has fewer"):
        evaluate("llama", tasks=(task(tmp_path),), num_fewshot=50, **few)


def test_a_tokenizer_without_a_token_to_begin_with_is_said_before_any_work(tmp_path: Path):
    for file in BUNDLED["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"))
    config.write_text(json.dumps({**json.loads(config.read_text()), **special}))
    with pytest.raises(UserError, match="tasks begin with BOS or EOS, and the tokenizer of .* has neither"):
        evaluate(str(tmp_path), num_windows=1, window=8, generate=0)


def test_what_is_not_installed_is_named_with_lm_evals_extra_for_it():
    missing = ModuleNotFoundError("No module named 'antlr4'", name="antlr4.runtime")
    assert str(loading_error("minerva", missing, "")).endswith("antlr4': pip install 'lm_eval[math]'")
    other = ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
    assert str(running_error("a, b", other, None)) == (
        "tasks a, b need what is not installed: No module named 'nowhere': pip install nowhere"
    )
