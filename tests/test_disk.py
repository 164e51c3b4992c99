"""What waits in files while a run goes on is at most what was said before it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from slimlm.calibration import load_windows
from slimlm.checkpoint.journal import Journal
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.compression import compress
from slimlm.methods import method_named
from slimlm.prepare import open_model, spilled
from slimlm.progress import Progress
from slimlm.recipe import Recipe, make_recipe
from slimlm.work import Work
from tests.conftest import SIZES, build_tiny

WINDOWS, LENGTH = 40, 24
RUNS = {
    "slice": {"sparsity": 0.2},
    "slice without refit": {"widths": "hidden=24", "refit": False},
    "slice per block": {"widths": "hidden=20", "basis": "per-block"},
    "rotate": {"method": "rotate"},
    "magnitude": {"method": "magnitude", "sparsity": 0.5},
    "magnitude solved": {"method": "magnitude", "sparsity": 0.5, "allocation": "solved"},
    "wanda owl": {"method": "wanda", "sparsity": 0.5, "allocation": "owl"},
    "sparsegpt solved": {"method": "sparsegpt", "sparsity": 0.5, "allocation": "solved"},
    "slimlm": {"method": "slimlm", "sparsity": 0.5},
    "slimlm global": {"method": "slimlm", "sparsity": 0.5, "allocation": "global"},
    "mfac": {"method": "mfac", "sparsity": 0.5, "fisher_samples": 64},
    "mfac of sequences": {"method": "mfac", "sparsity": 0.5, "fisher_samples": 8, "fisher_unit": "sequence"},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS.keys())
def test_what_waits_in_files_is_at_most_what_was_said(tmp_path: Path, monkeypatch, settings: dict):
    path = build_tiny(LlamaConfig(**{**SIZES, "num_hidden_layers": 8}), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The old house stood at the end of the lane, and nobody had lived there. " * 200)
    recipe = make_recipe(
        {
            "model": str(path), "dataset": str(text), "num_calibration_samples": WINDOWS, "max_seq_length": LENGTH,
            "eval_text": str(text), "eval_windows": 8, "output_dir": str(tmp_path / "out"), **settings,
        }
    )  # fmt: skip
    most = watch(monkeypatch, tmp_path / "out.partial" / "work")
    compress(recipe)
    assert (
        0 < most[0] <= said(recipe, path) + WINDOWS * LENGTH * 8 + 20_000
    )  # the journal's own: tokens, a basis, figures


def said(recipe: Recipe, path: Path) -> int:
    model = open_model(path, torch.device("cpu"), "fast")
    assert len(load_windows(recipe.dataset or "", load_tokenizer(path), WINDOWS, LENGTH).tokens) == WINDOWS
    method = method_named(recipe.method)
    data = recipe.dataset if method.calibrates(recipe, path) else None
    return spilled(recipe.model_copy(update={"dataset": data}), method, model)


def watch(monkeypatch: pytest.MonkeyPatch, place: Path) -> list[int]:
    """The most bytes that ever lie in the work files, looked at before anything is let go of and after every step."""
    most = [0]

    def look() -> None:
        if place.is_dir():
            files = [file for file in place.iterdir() if file.suffix != ".jsonl"]
            most[0] = max(most[0], sum(file.stat().st_size for file in files))

    for owner, name in ((Work, "clear_scratch"), (Journal, "commit"), (Progress, "done")):
        original = getattr(owner, name)

        def looking(*args, original=original, **kwargs):
            look()
            answer = original(*args, **kwargs)
            look()
            return answer

        monkeypatch.setattr(owner, name, looking)
    return most
