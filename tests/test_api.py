"""A model in memory: the same engine, the same weights."""

import html
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import slimlm
from slimlm import UserError, one_step
from slimlm.cli import app
from tests.api_page import PAGE, page
from tests.conftest import CONFIGS, build_tiny, random_tokens

TEXTS = ["The old house stood at the end of the lane, and nobody had lived there since. " * 30] * 3
SMALL = {"num_calibration_samples": 6, "max_seq_length": 32, "measure": False}


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[PreTrainedModel, Any, Path]:
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(path).train(), AutoTokenizer.from_pretrained(path), path


def test_a_model_in_memory_becomes_what_its_checkpoint_would(loaded, tmp_path: Path):
    model, tokenizer, path = loaded
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = slimlm.compress(model, tokenizer, widths="hidden=16", dataset=TEXTS, work_dir=tmp_path, **SMALL)
    assert isinstance(found, MistralForCausalLM)
    assert not found.training
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (tmp_path / "texts.txt").write_text("\n<|endoftext|>\n".join(TEXTS))
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    recipe = one_step(
        model=str(path), widths="hidden=16", dataset=str(tmp_path / "texts.jsonl"), **SMALL,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    slimlm.compress(recipe)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.items())
    assert found.slimlm["parameters"]["compressed"] == sum(tensor.numel() for tensor in expected.values())
    assert sorted(child.name for child in tmp_path.iterdir()) == ["model", "out", "texts.jsonl", "texts.txt"]


def test_tokens_are_taken_as_they_are(loaded):
    model, tokenizer, _ = loaded
    tokens = random_tokens(7, 24)
    found = slimlm.compress(model, tokenizer, method="wanda", pattern="2:4", dataset=tokens, measure=False)
    assert type(found) is type(model)
    assert (found.slimlm["calibration"]["windows"], found.slimlm["calibration"]["window"]) == (7, 24)
    assert found.slimlm["model"]["name"] == model.config.name_or_path
    weight = found.model.layers[0].mlp.up_proj.weight
    assert ((weight.view(-1, 4) == 0).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.5}, "recipe: sparsity is the share"),
        ({"sparsity": 0.5, "output_dir": "x"}, "output_dir is of no use"),
        ({"sparsity": 0.5, "dataset": torch.zeros(3, 4)}, "tokens are integers"),
        ({"sparsity": 0.5, "method": "wanda"}, "no calibration data"),
        ({"sparsty": 0.5}, "recipe: unknown key 'sparsty'; did you mean 'sparsity'"),
    ],
)
def test_mistakes_are_one_line(loaded, settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        slimlm.compress(*loaded[:2], **settings)


def test_what_is_no_model_is_refused(loaded):
    with pytest.raises(UserError, match="not a Linear"):
        slimlm.compress(torch.nn.Linear(2, 2), loaded[1])
    with pytest.raises(UserError, match="needs the model's tokenizer"):
        slimlm.compress(loaded[0])


def test_a_wrong_argument_is_met_with_what_was_meant():
    for call, message in (
        (lambda: slimlm.evaluate("x", agianst="y"), "^evaluate: .*'agianst'; did you mean 'against'"),
        (lambda: slimlm.bench("x", batch_size=1), "^bench: .*'batch_size'; did you mean 'batch_sizes'"),
        (lambda: slimlm.inspect_model("x", data="y"), "^inspect_model: .*'data'; did you mean 'dataset'"),
        (
            lambda: slimlm.compress(one_step(model="x", sparsity=0.5), overwite=True),
            "'overwite'; did you mean 'overwrite'",
        ),
        (lambda: slimlm.evaluate(), "^evaluate: missing 1 required positional argument: 'model'$"),
        (lambda: one_step(modle="x", sparsity=0.5), "'modle'; did you mean 'model'"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_results_take_paths_and_print_as_their_commands_show_them(loaded, tmp_path: Path, monkeypatch):
    path, text = loaded[2], tmp_path / "a<b>.txt"
    text.write_text("".join(TEXTS))
    how = {"num_calibration_samples": 6, "max_seq_length": 32, "eval_text": text, "eval_windows": 2}
    recipe = one_step(model=path, sparsity=0.25, dataset=text, output_dir=tmp_path / "out", **how)
    made = slimlm.compress(recipe)
    words = {"text": [text], "num_windows": 2, "window": 24, "tasks": (), "generate": 0}
    evaluated = slimlm.evaluate([made.output_dir], against=path, **words)
    benched = slimlm.bench(made.output_dir, path, batch_sizes=[1], prompt_tokens=4, new_tokens=3, rounds=1)
    inspected = slimlm.inspect_model(made.output_dir)
    for command, found in (
        (None, made),
        (
            ["eval", "--text", str(text), "--num-windows", "2", "--window", "24", "--tasks", "none", "--generate", "0"],
            evaluated,
        ),
        (["inspect"], inspected),
        (None, benched),
    ):
        shown = str(found)
        parameters = f"{made.manifest['parameters']['compressed']:,}"
        assert parameters in shown or found is benched
        assert found._repr_html_() == f"<pre>{html.escape(shown)}</pre>"
        if command is not None:
            against = ["--against", str(path)] if found is evaluated else []
            done = CliRunner().invoke(app, [command[0], str(made.output_dir), *against, *command[1:]])
            assert done.stdout.rstrip() == shown.rstrip()
    assert "a&lt;b&gt;.txt" in made._repr_html_()
    assert "decode tok/s" in str(benched)


def test_the_page_of_the_docs_is_that_of_the_docstrings():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.api_page"
    assert all(f"## `slimlm.{name}`" in page() for name in slimlm.__all__ if not name.startswith("_"))
