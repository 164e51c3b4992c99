"""Slicing to a share of the time that decoding takes: from a recipe to a checkpoint, killed on the way or not."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from slimlm.check import How, _time
from slimlm.cli import app
from slimlm.errors import UserError
from slimlm.model.shape_times import Shape, StepTimes, products_seconds
from slimlm.model.streamed import StreamedModel
from slimlm.ranks import Ranks
from slimlm.recipe import Recipe, make_recipe, one_step
from slimlm.slice import curves
from slimlm.slice import plan as planning
from slimlm.stages import compress
from tests.conftest import CONFIGS, build_tiny, in_steps, stream
from tests.test_resume import Killed, die_at, result


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    text = tmp_path / "text.txt"
    text.write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)
    return {
        "model": str(build_tiny(CONFIGS["llama"], tmp_path / "model")), "dataset": str(text), "measure": False,
        "num_calibration_samples": 6, "max_seq_length": 32, "batch_size": 4, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip


@pytest.fixture
def recipe(settings: dict) -> Recipe:
    return one_step(**settings, latency=0.7)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[StepTimes]:
    """What was measured, one after another: no two machines are alike."""
    found: list[StepTimes] = []

    def times(model: StreamedModel, shapes: Mapping[Shape, int], dtype: torch.dtype) -> StepTimes:
        tall = 1 + 2 * len(found)  # by turns what has many outputs is slow
        products = {(out, inner): 1e-6 + 1e-9 * out * inner + tall * 1e-8 * out for out, inner in shapes}
        found.append(StepTimes(products_seconds(shapes, products) + 3 * 1e-6, 3, products))
        return found[-1]

    monkeypatch.setattr(planning, "step_times", times)
    return found


def test_the_manifest_says_what_was_measured_and_the_widths_give_the_same_again(
    recipe: Recipe, measured: list[StepTimes], settings: dict, tmp_path: Path
):
    made = compress(recipe)
    said, method = made.manifest["method"]["latency"], made.manifest["method"]
    assert StepTimes.read(**said["times"]) == measured[0]
    assert said["dense_ms"] == pytest.approx(1000 * measured[0].step)
    assert said["ratio"] == pytest.approx(said["predicted_ms"] / said["dense_ms"])
    assert 0.6 < said["ratio"] <= 0.7
    assert method["splits"] > 1
    assert [step["latency"] for step in made.manifest["recipe"]["steps"]] == [0.7]
    by_hand = compress(one_step(**{**settings, "output_dir": str(tmp_path / "again")}, widths=method["widths"]))
    assert result(by_hand.output_dir) == result(made.output_dir)


def test_a_run_that_was_killed_goes_on_with_the_times_it_measured(
    recipe: Recipe, measured: list[StepTimes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    expected = compress(recipe.updated(output_dir=str(tmp_path / "expected")))
    other = compress(recipe.updated(output_dir=str(tmp_path / "other")))
    del measured[:]
    widths = expected.manifest["method"]["widths"]
    assert other.manifest["method"]["widths"] != widths  # so that measuring again would be seen
    for after in (False, True):
        with monkeypatch.context() as patch:
            die_at(patch, curves, "choose", 1, after)
            with pytest.raises(Killed):
                compress(recipe)
        made = compress(recipe, resume=True)
        assert len(measured) == 1
        assert result(made.output_dir) == result(expected.output_dir)
        assert compress(recipe, resume=True).manifest["method"]["widths"] == widths  # it is complete already
        assert len(measured) == 1
        compress(recipe, overwrite=True)
        assert len(measured) == 2  # a run of its own measures anew
        made.output_dir.rename(tmp_path / f"{after}")
        del measured[:]


def test_a_run_with_another_latency_is_not_resumed(
    recipe: Recipe, measured: list[StepTimes], monkeypatch: pytest.MonkeyPatch, settings: dict
):
    with monkeypatch.context() as patch:
        die_at(patch, curves, "choose", 1, after=False)
        with pytest.raises(Killed):
            compress(recipe)
    with pytest.raises(UserError, match=r"^cannot resume: recipe latency was 0\.7, is now 0\.75"):
        compress(one_step(**settings, latency=0.75), resume=True)


def test_a_later_step_is_timed_when_its_turn_comes_and_resumed_with_that(
    measured: list[StepTimes], settings: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    steps = [{"method": "magnitude", "sparsity": 0.3}, {"method": "slice", "latency": 0.7}]
    recipe = make_recipe({**settings, "steps": steps})
    expected = result(compress(recipe.updated(output_dir=str(tmp_path / "expected"))).output_dir)
    assert len(measured) == 1
    del measured[:]
    with monkeypatch.context() as patch:
        die_at(patch, curves, "choose", 1, after=False)
        with pytest.raises(Killed):
            compress(recipe)
    assert result(compress(recipe, resume=True).output_dir) == expected
    assert len(measured) == 1


def test_a_complete_result_whose_first_step_was_timed_is_not_timed_again(measured: list[StepTimes], settings: dict):
    steps = [{"method": "slice", "latency": 0.7}, {"method": "magnitude", "sparsity": 0.3}]
    recipe = make_recipe({**settings, "steps": steps})
    expected = result(compress(recipe).output_dir)
    assert len(measured) == 1
    assert result(compress(recipe, resume=True).output_dir) == expected
    assert len(measured) == 1


def test_pruning_what_was_sliced_to_a_latency_finds_whole_groups(measured: list[StepTimes], settings: dict):
    made = compress(in_steps({**settings, "latency": 0.7, "round_to": 8}, {"method": "magnitude", "pattern": "2:4"}))
    assert made.manifest["stages"][0]["method"]["latency"]["ratio"] <= 0.7
    assert made.manifest["sparsity"]["zeros_in_pruned_matrices"] == 0.5


def test_all_ranks_have_the_times_of_the_first(recipe: Recipe, settings: dict, measured: list[StepTimes]):
    told = StepTimes(1.0, 1, {(1, 1): 2.0})

    class Second(Ranks):
        def decided(self, decide: Callable[[], object]) -> object:
            return told  # what the first found; this one does not look

    model = stream(Path(settings["model"]))
    _time(recipe.steps[0], model, Path(settings["output_dir"]), How(ranks=Second(rank=1, size=2)))
    assert model.times is told
    assert not measured


def test_the_bundled_model_is_made_faster_on_this_machine(tmp_path: Path):
    """Really measured: whatever this machine says is within what was asked for."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Function number {number} returns the sum of its arguments. " for number in range(400)))
    words = ["compress", "-m", "llama", "--latency", "0.8", "--dataset", str(text), "--self-share", "0"]
    words += ["--num-calibration-samples", "16", "--max-seq-length", "32", "--eval-windows", "2"]
    done = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out" / "slimlm.json").read_text())
    said = manifest["method"]["latency"]
    assert 0.3 < said["ratio"] <= 0.8
    assert len(said["times"]["products"]) > 10
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.num_parameters() < 6_524_160
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
    assert "decoding, one sequence: " in done.output
    assert f"ms a token predicted, {said['ratio']:.3f} of what the dense model takes" in done.output


def test_a_dry_run_says_what_is_measured(settings: dict, measured: list[StepTimes], in_process):
    words = ["compress", "-m", settings["model"], "--latency", "0.7", "--dataset", settings["dataset"], "--dry-run"]
    words += [
        "--num-calibration-samples",
        "6",
        "--max-seq-length",
        "32",
        "--self-share",
        "0",
        "-o",
        settings["output_dir"],
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "splits over " in done.output
    assert f"decoding, one sequence: {1000 * measured[0].step:.3g} ms a token, predicted then: " in done.output
    assert not Path(settings["output_dir"]).exists()
