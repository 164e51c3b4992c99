"""What `slice` and `slimlm` do unless they are told not to, and when they do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import slimlm.unasked
from slimlm.calibration import SAMPLING_BATCH, remembered
from slimlm.calibration.sample import FEWEST, MOST_CACHED, sampling_batch
from slimlm.check import How, check
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.progress import Progress
from slimlm.ranks import ALONE
from slimlm.recipe import make_recipe, one_step
from slimlm.stages import compress, later_steps
from slimlm.unasked import EPOCHS, unasked
from tests.conftest import stream

pytestmark = pytest.mark.usefixtures("as_shipped")
GIVEN = {"num_calibration_samples": 12, "max_seq_length": 24, "batch_size": 6, "measure": False}


class Lines(Progress):
    """What is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word{number} and some more of it." for number in range(2000)))
    return path


def checked(model: Path, output: Path, progress: Progress | None = None, **settings: Any) -> Any:
    recipe = one_step(**{"model": str(model), "output_dir": str(output), **GIVEN, **settings})
    return check(recipe.steps[0], How(progress=progress or Progress()))


@pytest.mark.parametrize(
    ("settings", "own", "epochs"),
    [
        ({"method": "slice", "sparsity": 0.2}, 12, EPOCHS),
        ({"method": "slimlm", "pattern": "2:4"}, 12, EPOCHS),
        ({"method": "slice", "sparsity": 0.2, "refine": 1}, 12, 1),
        ({"method": "slimlm", "sparsity": 0.5, "self_share": 0.25, "refine": 0}, 4, 0),
        ({"method": "slimlm", "sparsity": 0.5, "self_share": 0}, 0, EPOCHS),
        ({"method": "slimlm", "sparsity": 0.5, "refit": False}, 0, 0),
        ({"method": "slice", "widths": "hidden=24", "refit": False}, 0, 0),
        ({"method": "slice", "widths": "hidden=16", "basis": "per-block"}, 0, 0),
        ({"method": "sparsegpt", "sparsity": 0.5}, 0, 0),
        ({"method": "wanda", "sparsity": 0.5}, 0, 0),
    ],
)
def test_what_aims_at_the_dense_model_writes_and_is_refined(
    tiny_llama: Path, tmp_path: Path, text: Path, settings: dict[str, Any], own: int, epochs: int
):
    step = checked(tiny_llama, tmp_path / "out", dataset=str(text), **settings).recipe
    assert step.own_windows == own
    assert step.num_windows == 12 + own
    assert (getattr(step, "refine", 0) or 0) == epochs


def test_a_mixture_is_taken_as_it_is_said(tiny_llama: Path, tmp_path: Path, text: Path):
    mixed = [{"source": str(text), "share": 0.75}, {"source": "self", "share": 0.25}]
    for dataset, own in ((mixed, 3), ("self", 12)):
        step = checked(tiny_llama, tmp_path / "out", dataset=dataset, sparsity=0.2).recipe
        assert step.own_windows == own


def test_the_share_is_of_the_windows_there_are(tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    short = tmp_path / "short.txt"
    short.write_text("A text that fills a few windows and no more. " * 14)
    job = checked(tiny_llama, tmp_path / "out", dataset=str(short), sparsity=0.2)
    assert 5 <= len(job.windows.tokens) < 12
    assert job.recipe.own_windows == len(job.windows.tokens)
    assert f"fills {len(job.windows.tokens)} windows of 24, not 12" in caplog.text


def test_later_steps_do_as_the_first(tiny_llama: Path, tmp_path: Path, text: Path):
    shared = {"model": str(tiny_llama), "output_dir": str(tmp_path / "out"), "dataset": str(text), **GIVEN}
    pruning = [{"method": "slimlm", "sparsity": 0.5}, {"method": "sparsegpt", "sparsity": 0.6}]
    recipe = make_recipe({**shared, "steps": [{"method": "slice", "sparsity": 0.2}, *pruning]})
    later = later_steps(check(recipe.steps[0], How(progress=Progress())), recipe)
    assert [(step.own_windows, step.refine) for step in later] == [(12, EPOCHS), (0, None)]


def test_the_text_of_the_first_step_serves_the_later_ones_as_it_is(tiny_llama: Path, tmp_path: Path, text: Path):
    shared = {"model": str(tiny_llama), "output_dir": str(tmp_path / "out"), "dataset": str(text), **GIVEN}
    steps = [{"method": "slimlm", "sparsity": 0.3}, {"method": "slimlm", "sparsity": 0.5}]
    manifest = compress(make_recipe({**shared, "steps": steps}), progress=Progress()).manifest
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert recipe.count("windows: 12\n") == 2
    assert manifest["calibration"]["windows"] == 24
    assert manifest["stages"][0]["recipe"]["dataset"] == manifest["recipe"]["dataset"]


def test_what_there_is_no_memory_for_is_left_out_and_said(
    tiny_llama: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(slimlm.unasked, "memory_size", lambda device: 10_000)
    said = Lines()
    step = checked(tiny_llama, tmp_path / "out", said, dataset=str(text), sparsity=0.2).recipe
    assert (step.own_windows, step.refine) == (0, 0)
    assert any(line.startswith("the model writes no calibration text beside the given: it would") for line in said.said)
    assert any(line.startswith("blocks are not refined: it would take") for line in said.said)
    steps = [{"method": "sparsegpt", "sparsity": 0.5}, {"method": "slimlm", "sparsity": 0.6}]
    shared = {"model": str(tiny_llama), "output_dir": str(tmp_path / "done"), "dataset": str(text), **GIVEN}
    compress(make_recipe({**shared, "steps": steps}), progress=(of_later := Lines()))
    assert any(line.startswith("blocks are not refined") for line in of_later.said)
    for asked in ({"self_share": 0.5, "refine": 2}, {"self_share": 0, "refine": 0}):
        said = Lines()
        step = checked(tiny_llama, tmp_path / "out", said, dataset=str(text), sparsity=0.2, **asked).recipe
        assert (bool(step.own_windows), step.refine) == (bool(asked["self_share"]), asked["refine"])
        assert not any("beside the given" in line or "not refined" in line for line in said.said)


def test_a_tokenizer_without_a_beginning_writes_nothing(tiny_llama: Path):
    tokenizer = load_tokenizer(tiny_llama, False)
    tokenizer.bos_token = tokenizer.eos_token = None
    (step,) = one_step(model=str(tiny_llama), sparsity=0.2).steps
    can = unasked(step, stream(tiny_llama), tokenizer, ALONE)
    assert "no token to begin with" in can.self_share
    assert not can.refine


def test_keys_and_values_of_what_is_written_together_are_bounded():
    wide = LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, hidden_size=4096)
    assert FEWEST < sampling_batch(wide, 256) < SAMPLING_BATCH
    assert 32 * remembered(wide, SAMPLING_BATCH, 256) <= MOST_CACHED
    assert remembered(wide, 2, 256) == 2 * 2 * 32 * 128 * 256
    assert sampling_batch(wide, 2048) == FEWEST
    assert sampling_batch(wide, 8) == SAMPLING_BATCH


class Stopping(Progress):
    """Interrupts a run at one of its steps."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, count: int = 1) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["slice", "slimlm"])
def test_the_defaults_give_a_stock_model_and_say_what_they_did(
    tiny_llama: Path, tmp_path: Path, text: Path, method: str
):
    """Also of a run that was interrupted: the same bytes."""
    output = tmp_path / "out"
    settings = {"model": str(tiny_llama), "dataset": str(text), "method": method, "sparsity": 0.2, **GIVEN}
    compress(one_step(**settings, output_dir=str(output)), progress=Progress())
    again = one_step(**settings, output_dir=str(tmp_path / "again"))
    for at in (6, 9):
        with pytest.raises(KeyboardInterrupt):
            compress(again, progress=Stopping(at), resume=True)
    compress(again, progress=Progress(), resume=True)
    weights = [(path / "model.safetensors").read_bytes() for path in (output, tmp_path / "again")]
    assert weights[0] == weights[1]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    recipe = json.loads((output / "slimlm.json").read_text())["recipe"]
    assert recipe["steps"][0]["refine"] == EPOCHS
    assert [(source["source"], source["windows"]) for source in recipe["dataset"]] == [(str(text), 12), ("self", 12)]


def test_too_few_tokens_for_what_is_fitted_are_said_with_the_number_that_would_do(
    tiny_llama: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Ten for each of the widest matrix's inputs, four of five windows being learnt from."""
    few = {"sparsity": 0.25, "dataset": str(text), "self_share": 0.0, "num_calibration_samples": 10}
    job = checked(tiny_llama, tmp_path / "out", **few)
    widest = job.model.config.intermediate_size
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{24 * 8:,} tokens are few to fit matrices of {widest} inputs" in line
    enough = int(line.split("--num-calibration-samples ")[1].split()[0])
    assert 24 * enough * 4 / 5 >= 10 * widest > 24 * (enough - 2) * 4 / 5
    caplog.clear()
    checked(tiny_llama, tmp_path / "out", **{**few, "num_calibration_samples": enough})
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("asked", [{}, {"num_calibration_samples": "auto"}, {"num_calibration_samples": None}])
@pytest.mark.parametrize(
    ("settings", "given", "own"),
    [
        ({"max_seq_length": 24}, 128, 128),
        ({"max_seq_length": 2}, 150, 150),
        ({"max_seq_length": 2, "self_share": 0.2}, 240, 60),
        ({"max_seq_length": 2, "refit": False}, 128, 0),
    ],
)
def test_as_many_windows_are_taken_as_the_widths_need(
    tiny_llama: Path, text: Path, tmp_path: Path, asked: dict, settings: dict, given: int, own: int
):
    """Ten tokens for each of 48 inputs, four of five windows of two tokens being learnt from, are 300 windows."""
    recipe = one_step(
        model=str(tiny_llama), output_dir=str(tmp_path / "out"), dataset=str(text), widths="hidden=24", measure=False,
        **settings, **asked,
    )  # fmt: skip
    step = check(recipe.steps[0], How(progress=Progress())).recipe
    assert (step.num_windows - step.own_windows, step.own_windows) == (given, own)


def test_what_fits_nothing_wants_no_tokens(tiny_llama: Path, text: Path, tmp_path: Path, caplog):
    checked(tiny_llama, tmp_path / "out", method="sparsegpt", sparsity=0.5, dataset=str(text))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
