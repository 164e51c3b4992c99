import json
from pathlib import Path

import pytest

import slimlm.forecast as forecast_module
from slimlm.compression import compress
from slimlm.errors import RunFailure, UserError
from slimlm.forecast import forecast
from slimlm.prepare import prepare
from slimlm.progress import Progress
from slimlm.recipe import Recipe
from tests.conftest import CONFIGS, build_tiny


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)
    return Recipe(
        model=str(build_tiny(CONFIGS["mistral-sliding"], tmp_path / "model")), sparsity=0.25,
        dataset=str(tmp_path / "text.txt"), num_calibration_samples=6, max_seq_length=32, batch_size=4, eval_windows=2,
        eval_text=str(tmp_path / "text.txt"), output_dir=str(tmp_path / "out"),
    )  # fmt: skip


def test_the_probe_runs_the_first_block_with_the_runs_own_tokens(recipe: Recipe, tmp_path: Path):
    job = prepare(recipe, False, Progress())
    place = tmp_path / "probe"
    place.mkdir()
    manifest, events = forecast_module._probe(job, place)
    config = json.loads((place / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert manifest["parameters"]["dense"] < sum(p.numel() for p in job.model.model.parameters())
    assert {event["part"] for event in events} == {"model.layers.0", "model.embed_tokens", "lm_head"}
    assert manifest["calibration"]["windows"] == 6


def test_a_forecast_writes_nothing_and_says_what_the_run_then_takes(recipe: Recipe, tmp_path: Path):
    found = forecast(prepare(recipe, False, Progress()), Progress())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]
    run = compress(recipe).manifest
    assert found.disk == pytest.approx(run["run"]["work_bytes"] + 4 * run["parameters"]["compressed"], rel=0.1)
    assert found.memory["host"] > 10**8
    assert found.seconds > 0


def test_too_little_memory_is_found_by_the_forecast(recipe: Recipe, monkeypatch):
    monkeypatch.setattr(forecast_module, "available_memory", lambda device: {"host": 10**6})
    with pytest.raises(UserError, match=r"needs \d+\.\d\d GB of host memory and 0\.00 GB are free: lower --batch-size"):
        forecast(prepare(recipe, False, Progress()), Progress())


def test_a_probe_that_fails_says_why(recipe: Recipe, tmp_path: Path):
    job = prepare(recipe, False, Progress())
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(RunFailure, match="probe of one block failed: slimlm: .*tokenizer"):
        forecast(job, Progress())
