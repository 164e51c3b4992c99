"""What waits on disk while a method runs is no more than what is asked of the disk beforehand."""

from pathlib import Path

import pytest

from slimlm.check import journalled, spilled
from slimlm.checkpoint.journal import Journal
from slimlm.model.saving import Saver
from slimlm.model.waiting import BatchFile
from slimlm.recipe import one_step
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.helpers import run


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of hidden states and gradients on disk, after each was written."""
    seen, written, kept = [0], BatchFile.write, Journal.keep

    def measure(directory: Path) -> None:
        files = [
            path
            for path in directory.iterdir()
            if path.suffix in (".0", ".1", ".2") or path.stem.startswith("gradients-")
        ]
        seen.append(sum(path.stat().st_size for path in files))

    def write(self: BatchFile, *rest) -> None:
        written(self, *rest)
        measure(self.path.parent)

    def keep(self: Journal, *rest, **facts) -> None:
        kept(self, *rest, **facts)
        measure(self.directory)

    monkeypatch.setattr(BatchFile, "write", write)
    monkeypatch.setattr("slimlm.model.hidden.SHARE", 1 << 60)  # no memory for any
    monkeypatch.setattr(Saver, "seconds", 1e-9)  # saved by a thread, whenever the last save is done
    monkeypatch.setattr(Journal, "keep", keep)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "wanda"},
        {"method": "sparsegpt"},
        {"method": "wanda", "allocation": "owl"},
        {"method": "sparsegpt", "allocation": "solved"},
        {"method": "sparsegpt", "allocation": "global", "fisher_samples": 10_000},
        {"method": "slimlm"},
        {"method": "slimlm", "curvature": "gram+fisher", "fisher_samples": 10_000},
        {"method": "mfac", "fisher_samples": 10_000},
        {"method": "mfac", "fisher_samples": 60, "fisher_unit": "sequence"},
        {"method": "rotate"},
        {"method": "slice", "widths": "hidden=24"},
        {"method": "slice", "widths": "hidden=24/mlp=24", "weighting": "none"},
        {"method": "slice", "widths": "hidden=24", "refit": False},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()).replace("/", ","),
)
def test_no_more_waits_on_disk_than_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak: list[int], settings: dict
):
    tokens = random_tokens(60, 16)
    for module in ("sweep", "token_gradients"):  # gradients of as many tokens as there are
        monkeypatch.setattr(f"slimlm.statistics.{module}.TOKENS", tokens.numel())
    settings = ({} if settings["method"] in ("slice", "rotate") else {"sparsity": 0.5}) | settings
    settings |= {"num_calibration_samples": len(tokens), "max_seq_length": tokens.shape[1], "dataset": "x.txt"}
    model = stream(build_tiny(CONFIGS["llama"], tmp_path / "model"))
    recipe = one_step(model="x", measure=False, **settings).steps[0]
    run(model, tokens, tmp_path / "run", **settings)
    wanted = sum(asked(recipe, model) for asked in (spilled, journalled))
    assert 0 < max(peak) <= wanted
    if "widths" not in settings:  # cuts are asked for as if all were made
        assert wanted < 6 * max(peak)
