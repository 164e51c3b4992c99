"""Fisher information of rows, and the methods that prune by it, written out from what a run's gradients are."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from slimlm.prune.curvature import row_fisher
from slimlm.statistics.token_gradients import TokenGradients
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.helpers import gathered_gradients, run, stock


def inverses(gradients: TokenGradients, damping: float, size: int) -> list[Tensor]:
    """Of each row, (F + lambda I)^-1 within blocks of `size` inputs, lambda so many mean diagonals of the matrix."""
    x, delta = (part.view(-1, gradients.window, part.shape[1]) for part in (gradients.x, gradients.delta))
    whole = torch.einsum("sto,sti->osi", delta, x)
    fishers = [rows.T @ rows / len(rows) for rows in whole]
    unit = damping * torch.stack([fisher.diagonal() for fisher in fishers]).mean()
    blocks = torch.block_diag(*[torch.ones(size, size).double()] * (x.shape[-1] // size))
    return [torch.linalg.inv(fisher * blocks + unit * torch.eye(x.shape[-1]).double()) for fisher in fishers]


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("tokens", "window"), [(6, 1), (30, 1), (12, 3), (60, 3)])
def test_rows_taken_some_at_a_time_have_each_their_own_inverse(
    monkeypatch: pytest.MonkeyPatch, tokens: int, window: int, blocks: bool
):
    generator = torch.Generator().manual_seed(0)
    x, delta, vector = (
        torch.randn(*shape, generator=generator).double() for shape in ((tokens, 8), (tokens, 5), (5, 8))
    )
    monkeypatch.setattr("slimlm.prune.curvature.BLOCK", 4)
    monkeypatch.setattr("slimlm.prune.curvature.CHUNK_ELEMENTS", 2 * max(x.numel(), 8 * 8))
    gradients = TokenGradients(x, delta * torch.arange(1.0, 6), window)
    found = row_fisher(gradients, 0.3, blocks)
    expected = inverses(gradients, 0.3, 4 if blocks else 8)
    assert torch.allclose(found.diagonal(), torch.stack([inverse.diagonal() for inverse in expected]), rtol=1e-9)
    solved = torch.stack([inverse @ row for inverse, row in zip(expected, vector, strict=True)])
    assert torch.allclose(found.times(vector), solved, rtol=1e-9)


@pytest.mark.parametrize(("method", "size"), [("mfac", 0), ("woodfisher", 16)])
def test_a_fisher_method_takes_the_cheapest_of_the_model_and_lets_the_rest_make_up_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, size: int
):
    """Scores w^2 / (2 [F^-1]) of all matrices compete; what stays moves by the sum of the surgeon's steps."""
    monkeypatch.setattr("slimlm.prune.curvature.BLOCK", 16)
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    model, tokens, dense = stream(path), random_tokens(8, 24), stock(path)
    found, _, done = run(model, tokens, tmp_path / "run", method=method, sparsity=0.3, fisher_samples=100)
    scores: dict[str, Tensor] = {}
    for index in range(3):
        for name, gradients in gathered_gradients(done, index).items():
            full = f"model.layers.{index}.{name}.weight"
            weight, rows = dense.get_parameter(full).double(), inverses(gradients, 0.1, size or gradients.x.shape[1])
            diagonal = torch.stack([inverse.diagonal() for inverse in rows])
            scores[full] = weight.square() / diagonal / 2
            gone = found[full] == 0
            assert scores[full][gone].max() <= scores[full][~gone].min() * (1 + 1e-6), name
            steps = torch.stack([inverse @ row for inverse, row in zip(rows, weight * gone / diagonal, strict=True)])
            assert torch.allclose(found[full].double(), (weight - steps).masked_fill(gone, 0), atol=1e-5), name
    every = torch.cat([score.flatten() for score in scores.values()]).sort().values
    threshold, zeros = every[round(0.3 * len(every)) - 1], {name: int((found[name] == 0).sum()) for name in scores}
    assert sum(zeros.values()) == pytest.approx(0.3 * len(every), abs=len(scores))
    for name, score in scores.items():  # where they are told apart: thresholds are exact to 1 in 128
        assert (score < threshold * (1 - 1 / 64)).sum() <= zeros[name] <= (score <= threshold * (1 + 1 / 64)).sum(), (
            name
        )
