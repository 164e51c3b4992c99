"""Masks of stacked matrices, written out; and that taking them in parts changes nothing."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slimlm.linalg.hessian import hessian
from slimlm.prune import masks, updates
from slimlm.prune.group import Row, prune
from slimlm.prune.quota import Quota
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.helpers import damped, inputs_of, is_linear, run, stock


def problem(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A weight [out, in], and the Gram of correlated inputs of several sizes."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(100, inputs, generator=generator).double()
        @ torch.randn(inputs, inputs, generator=generator).double()
    )
    x *= torch.logspace(-1, 1, inputs).double()
    return torch.randn(outputs, inputs, generator=generator).double(), x.T @ x


def smallest_by_hand(scores: Tensor, count: int, tile: tuple[int, int]) -> Tensor:
    """As many whole tiles of a matrix, with the smallest sums, as `count` weights come to."""
    gone, (rows, columns) = torch.zeros_like(scores, dtype=torch.bool), tile
    places = [
        (slice(top, top + rows), slice(left, left + columns))
        for top in range(0, scores.shape[0], rows)
        for left in range(0, scores.shape[1], columns)
    ]
    for place in sorted(places, key=lambda place: float(scores[place].sum()))[: count // math.prod(tile)]:
        gone[place] = True
    return gone


@pytest.mark.parametrize("tile", [(1, 1), (2, 4)])
@pytest.mark.parametrize("mask", ["obs", "wanda", "magnitude"])
def test_masks_are_of_the_smallest_scores_of_each_matrix(mask: str, tile: tuple[int, int]):
    """Wanda's single weights compete within a row; its tiles, as all others, in the matrix."""
    weight, gram = problem(10, 16)
    inverse = torch.linalg.inv(damped(gram)).diagonal()
    scores = {
        "obs": weight.square() / inverse,
        "wanda": weight.abs() * damped(gram).diagonal().sqrt(),
        "magnitude": weight.abs(),
    }[mask]
    quota = Quota((6, 4), (48, 16), tile=tile)
    _, pruned = prune(weight, hessian(gram.clone()), quota, Row("gram", masks.MASKS[mask], updates.none))
    for part, found, count in zip(scores.split([6, 4]), pruned.split([6, 4]), (48, 16), strict=True):
        if mask == "wanda" and tile == (1, 1):
            expected = torch.cat([smallest_by_hand(row[None], count // len(part), tile) for row in part])
        else:
            expected = smallest_by_hand(part, count, tile)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("settings", [{"mask": "wanda"}, {"mask": "wanda", "curvature": "gram", "update": "none"}])
def test_tiles_are_weighed_by_the_norms_of_their_inputs(tmp_path: Path, settings: dict):
    path, tokens = build_tiny(CONFIGS["llama"], tmp_path / "model"), random_tokens(8, 24)
    settings |= {"method": "wanda", "pattern": "4x8", "sparsity": 0.5, "reorder": False}
    found, _, _ = run(stream(path), tokens, tmp_path / "run", **settings)
    pruned, dense = stock(tmp_path / "run" / "model"), stock(path)
    for index, block in enumerate(dense.model.layers):
        pruned.model.layers[index].load_state_dict(block.state_dict())
        for name in filter(is_linear, dict(block.named_modules())):
            full = f"model.layers.{index}.{name}"
            (x,) = inputs_of(pruned, tokens, [full])
            scores = dense.get_submodule(full).weight.double().abs() * x.flatten(0, 1).norm(dim=0)
            gone = found[f"{full}.weight"] == 0
            assert torch.equal(gone, smallest_by_hand(scores, int(gone.sum()), (4, 8))), full
        for name, parameter in pruned.model.layers[index].named_parameters():
            parameter.data.copy_(found[f"model.layers.{index}.{name}"])


@pytest.mark.parametrize(
    "row",
    [
        Row("gram", masks.columns, updates.left_to_right),
        Row("gram", masks.greedy, updates.joint),
        Row("gram", masks.obs, updates.summed),
        Row("gram", masks.obs, updates.joint, swaps=1),
        Row("gram", masks.magnitude, updates.left_to_right),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "quota", [Quota((6, 4), (40, 30)), Quota((6, 4), (0, 0), keep=2, group=4)], ids=["counts", "2:4"]
)
def test_matrices_taken_one_after_another_are_as_if_taken_together(
    monkeypatch: pytest.MonkeyPatch, row: Row, quota: Quota
):
    weight, gram = problem(10, 16)
    whole, mask = prune(weight, hessian(gram.clone()), quota, row)
    for chunk, batch in ((3 * 16, 2 * 16 * 16), (1, 1)):
        monkeypatch.setattr("slimlm.prune.updates.CHUNK_ELEMENTS", chunk)
        monkeypatch.setattr("slimlm.linalg.obs.BATCH_ELEMENTS", batch)
        monkeypatch.setattr("slimlm.linalg.masks.CHUNK_ELEMENTS", chunk)
        parts, same = prune(weight, hessian(gram.clone()), quota, row)
        assert torch.equal(mask, same)
        assert torch.allclose(whole, parts, atol=1e-4 * float(whole.abs().max()))
