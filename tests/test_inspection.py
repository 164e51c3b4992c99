import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from slimlm.calibration import load_windows
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.cli import app
from slimlm.errors import RunFailure
from slimlm.inspection import SPARSITIES, figures_of, inspect_model
from slimlm.report.table import inspection_table
from tests.conftest import CONFIGS, build_tiny
from tests.helpers import damped, inputs_of, stock


def test_figures_are_those_of_the_weights(tmp_path: Path):
    path = build_tiny(CONFIGS["llama-biased"], tmp_path / "model")
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)
    blind = inspect_model(str(path))
    seen = inspect_model(str(path), str(tmp_path / "text.txt"), windows=3, window=24)
    assert [figures.name for figures in blind] == [figures.name for figures in seen]
    assert len(blind) == 3 * 7
    assert blind[0].name == "model.layers.0.self_attn.q_proj"
    for one, other in zip(blind, seen, strict=True):
        assert (one.pq, one.alpha, one.stable_rank) == (other.pq, other.alpha, other.stable_rank)
        assert one.outliers is None
        assert one.predicted is None
    tokens = load_windows(str(tmp_path / "text.txt"), load_tokenizer(path), 3, 24).tokens
    model = stock(path)
    for figures, x in zip(seen, inputs_of(model, tokens, [figures.name for figures in seen]), strict=True):
        weight, x = model.get_submodule(figures.name).weight.double(), x.flatten(0, 1)
        sizes = weight.abs() * x.norm(dim=0)
        assert figures.outliers == pytest.approx(float((sizes > 5 * sizes.mean()).double().mean()), abs=2e-3)
        scores = (weight.square() / torch.linalg.inv(damped(x.T @ x)).diagonal()).flatten().sort().values
        energy = float((x @ weight.T).square().sum())
        expected = [float(scores[: round(share * len(scores))].sum()) / energy for share in SPARSITIES]
        assert figures.predicted == pytest.approx(expected, rel=1e-3)


def test_the_predicted_loss_of_uncorrelated_inputs_is_the_energy_that_goes():
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    found = figures_of("w", weight, 10 * torch.eye(6, dtype=torch.float64))
    squares = weight.square().flatten().sort().values
    expected = [float(squares[:count].sum() / squares.sum()) for count in (12, 24, 36)]
    assert found.predicted == pytest.approx([1.01 * share for share in expected])  # the damping counts as energy
    assert found.stable_rank == pytest.approx(float(weight.norm() ** 2 / torch.linalg.matrix_norm(weight, 2) ** 2))


def test_zeros_are_counted_and_nan_is_named():
    weight = torch.ones(4, 4)
    weight[0] = 0
    assert figures_of("w", weight).zeros == 0.25
    assert math.isfinite(figures_of("w", torch.zeros(4, 4)).alpha)
    with pytest.raises(RunFailure, match=r"model\.w\.weight holds NaN"):
        figures_of("model.w", weight * float("nan"))


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    result = CliRunner().invoke(app, ["inspect", str(path), "--json", str(tmp_path / "figures.json")])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert len(rows) == 21
    assert {"pq", "pq_with_zeros", "alpha", "stable_rank"} < rows[0].keys()
    assert "prunable" in result.output


def test_both_indices_of_a_pruned_matrix_are_shown():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < weight.abs().median()] = 0
    figures = figures_of("model.layers.0.q", weight)
    assert figures.pq < 0.1 < 0.45 < figures.pq_with_zeros
    assert figures.prunable > 0.5  # the zeros are gone already
    console = Console(width=120, file=io.StringIO())
    console.print(inspection_table([figures.describe()], SPARSITIES))
    assert f"{figures.pq:.3f}" in console.file.getvalue()
    assert f"{figures.pq_with_zeros:.3f}" in console.file.getvalue()
