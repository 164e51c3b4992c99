import io
import json
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from slimlm.calibration import load_windows
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.cli import app
from slimlm.errors import RunFailure, UserError
from slimlm.inspection import SLICED, SPARSITIES, Inspection, MatrixFigures, ModelFacts, figures_of, inspect_model
from slimlm.recipe import one_step
from slimlm.report.inspection import inspection_shown, matrices_tables
from slimlm.slice.candidates import Choice, candidates
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout
from slimlm.stages import compress
from tests.conftest import CONFIGS, build_tiny, stream
from tests.helpers import damped, inputs_of, stock


def test_figures_are_those_of_the_weights(tmp_path: Path):
    path = build_tiny(CONFIGS["llama-biased"], tmp_path / "model")
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)
    blind = inspect_model(str(path)).matrices
    seen = inspect_model(str(path), str(tmp_path / "text.txt"), windows=3, window=24).matrices
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
    found = json.loads((tmp_path / "figures.json").read_text())
    assert len(found["matrices"]) == 21
    assert {"pq", "pq_with_zeros", "alpha", "stable_rank"} < found["matrices"][0].keys()
    assert found["result"] is None
    assert "prunable" in result.output


def test_both_indices_of_a_pruned_matrix_are_shown():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < weight.abs().median()] = 0
    figures = figures_of("model.layers.0.q", weight)
    assert figures.pq < 0.1 < 0.45 < figures.pq_with_zeros
    assert figures.prunable > 0.5  # the zeros are gone already
    shown = rendered(matrices_tables([figures]))
    assert f"{figures.pq:.3f}" in shown
    assert f"{figures.pq_with_zeros:.3f}" in shown


def rendered(parts: Iterable[RenderableType], width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    for part in parts:
        console.print(part, crop=False)
    return console.file.getvalue()


def test_a_dense_model_is_told_the_widths_a_slice_of_it_chooses_from(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    found = inspect_model(str(path))
    assert found.model.parameters == sum(tensor.numel() for tensor in stock(path).state_dict().values())
    assert [one.sparsity for one in found.widths] == list(SLICED)
    shapes = Shapes(Layout(stream(path)))
    for one in found.widths:
        splits = candidates(shapes, one_step(model="x", sparsity=one.sparsity).steps[0])
        assert one.splits == len(splits) > 0
        for axis in ("hidden", "mlp", "groups"):
            widths = [split.of(axis) for split in splits]
            assert getattr(one, axis) == (min(widths), max(widths))
        assert one.blocks == (min(len(split.blocks) for split in splits), max(len(split.blocks) for split in splits))
        least, most = one.parameters
        assert all(abs(1 - left / found.model.parameters - one.sparsity) <= 0.0101 for left in (least, most))
        assert one.bytes == (4 * least, 4 * most)


@pytest.mark.parametrize(
    ("settings", "has_widths"),
    [({"sparsity": 0.25}, False), ({"method": "wanda", "pattern": "2:4"}, False), ({"method": "rotate"}, True)],
)
def test_a_result_says_what_was_done_and_where_it_loads(tmp_path: Path, settings: dict, has_widths: bool):
    path, text = build_tiny(CONFIGS["llama"], tmp_path / "model"), str(tmp_path / "text.txt")
    Path(text).write_text("The old house stood at the end of the lane, and nobody had lived there. " * 60)
    how = {"num_calibration_samples": 6, "max_seq_length": 32, "eval_text": text, "eval_windows": 2}
    recipe = one_step(model=str(path), dataset=text, output_dir=str(tmp_path / "out"), **how, **settings)
    manifest = compress(recipe).manifest
    found = inspect_model(str(tmp_path / "out"))
    assert bool(found.widths) == has_widths
    assert (
        found.result.items()
        >= {
            **{name: manifest[name] for name in ("sparsity", "changes", "parameters", "bytes", "measured")},
            "made_of": str(path),
        }.items()
    )
    assert found.model.parameters == manifest["parameters"]["compressed"]
    shown = rendered(inspection_shown(found))
    assert f"{manifest['measured']['compressed']['perplexity']:.2f}" in shown
    assert "stock transformers loads it" in shown
    assert ("were tried in" in shown) == bool(found.result["tried_in"]) is True
    (tmp_path / "out" / "slimlm.json").write_text('{"recipe": {"steps": []}}')
    with pytest.raises(UserError, match="is not one that this slimlm wrote: it lacks 'model'"):
        inspect_model(str(tmp_path / "out"))


def test_no_figure_is_cut_at_80_columns():
    """Of matrices as long and large as there are, and of a result."""
    name = "model.layers.{}.block_sparse_moe.experts.127.down_proj"
    figures = [
        MatrixFigures(
            name.format(number),
            (53248, 131072),
            0.505,
            0.1234,
            0.4567,
            0.9876,
            12.345,
            16384.5,
            0.1234,
            (1.0, 0.5, 0.25),
        )
        for number in (0, 125)
    ]
    facts = ModelFacts("a" * 70, "b", "llama", 405 * 10**9, 810 * 10**9, "bfloat16", 16384, 53248, 8, 126)
    spans = (9184, 16384), (16384, 53248), (1, 8), (60, 126), (202 * 10**9, 209 * 10**9), (404 * 10**9, 418 * 10**9)
    shown = rendered(
        inspection_shown(Inspection(facts, None, (Choice(0.5, 123456, *spans), Choice(0.1, 0)), tuple(figures)))
    )
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    for figure in (
        "53248x131072",
        "50.5%",
        "0.123",
        "0.457",
        "98.8%",
        "12.35",
        "16384.5",
        "12.34%",
        "100.00%",
        "50.00%",
        "25.00%",
    ):
        assert shown.count(figure) == 2, figure
    for figure in ("123,456", "9184-16384", "16384-53248", "60-126", "202-209G", "404-418G", "405,000,000,000"):
        assert figure in shown, figure
