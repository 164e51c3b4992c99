"""Kernels that leave zeros out compute what dense ones do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import slimlm
from slimlm.errors import RunFailure, UserError
from slimlm.evaluation.speed import sparse_kernels
from slimlm.evaluation.speed.sparse_kernels import (
    TileLinear,
    density,
    is_2_of_4,
    kernels_for,
    swap_kernels,
    tile_found,
    tile_said,
)
from slimlm.evaluation.speed.stock import StockRunner
from tests.conftest import build_tiny, random_tokens
from tests.helpers import is_linear

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def in_tiles(out: int, inner: int, tile: tuple[int, int], kept: float) -> torch.Tensor:
    """A random weight [out, in] of which every so many-th tile holds something."""
    tiles = torch.zeros(out // tile[0] * (inner // tile[1]))
    tiles[: round(kept * len(tiles))] = 1
    tiles = tiles[torch.randperm(len(tiles))].view(out // tile[0], -1)
    return torch.randn(out, inner) * tiles.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)


def tiled(path: Path, tile: tuple[int, int] = (8, 8), kept: float = 0.25) -> Path:
    """Make a tiny checkpoint one pruned in tiles."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if is_linear(name):
            tensors[name] = 0.2 * in_tiles(*tensor.shape, tile, kept)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def manifest(*steps: dict[str, Any]) -> Any:
    return {"recipe": {"steps": list(steps)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(8, 8), (16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_in_tiles_gives_what_the_dense_one_gives(dtype: torch.dtype, tile: tuple[int, int], bias: bool):
    dense = nn.Linear(48, 64, bias=bias).requires_grad_(False)
    dense.weight.copy_(in_tiles(64, 48, tile, 0.25))
    dense = dense.to(dtype)
    x = torch.randn(2, 5, 48, dtype=dtype)
    found = TileLinear(dense, tile)(x)
    exact = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double() if bias else None)
    assert found.dtype == dtype
    assert float((found - exact).abs().max()) <= max(2 * torch.finfo(dtype).eps * float(exact.abs().max()), 1e-5)


def test_density_and_tiles_are_found():
    weight = in_tiles(64, 96, (16, 16), 0.25)
    assert density(weight, (16, 16)) == 0.25
    assert density(torch.ones(4, 4), (2, 2)) == 1
    assert tile_found([weight]) == (16, 16)
    assert tile_found([weight, in_tiles(64, 64, (8, 8), 0.25)]) == (8, 8)
    assert tile_found([torch.randn(64, 64)]) is None
    assert tile_found([torch.randn(64, 64) * (torch.rand(64, 64) < 0.5)]) is None


def test_2_of_4_is_told_apart():
    pattern = torch.tensor([1.0, 0, 0, 1] * 4).repeat(3, 1)
    assert is_2_of_4(pattern)
    assert not is_2_of_4(pattern.roll(1, 1) + pattern)
    assert not is_2_of_4(torch.zeros(3, 6))


@pytest.mark.parametrize(
    ("said", "on_cpu", "on_gpu", "tile"),
    [
        (None, None, None, None),
        ({}, None, None, None),
        ({"recipe": {"sparsity": 0.5}}, None, None, None),
        (manifest({"method": "slice"}), None, None, None),
        (manifest({"pattern": "16x24"}), "bsr", "bsr", (8, 8)),
        (manifest({"pattern": "16x24"}, {"method": "recover"}), "bsr", "bsr", (8, 8)),
        (manifest({"pattern": "16x24"}, {"pattern": "2:4"}), None, "2:4", None),
        (manifest({"pattern": "4:8"}), None, None, None),
    ],
)
def test_a_manifest_says_which_kernels(said: Any, on_cpu: str | None, on_gpu: str | None, tile: Any):
    assert (kernels_for(said, CPU), kernels_for(said, GPU), tile_said(said)) == (on_cpu, on_gpu, tile)


def test_a_model_with_sparse_kernels_computes_what_it_did(tiny: Path):
    model = AutoModelForCausalLM.from_pretrained(tiled(tiny)).eval()
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        before = model(tokens).logits
        weights = StockRunner(model).weights
        found = swap_kernels(model, "bsr", None, tokens)
        torch.testing.assert_close(model(tokens).logits, before, atol=1e-4, rtol=1e-4)
    assert (found.kernels, found.density, found.linears, found.of) == ("bsr 8x8", 0.25, 21, 22)
    assert found.difference < 1e-5
    assert StockRunner(model).weights < weights


def test_kernels_that_compute_something_else_are_found_out(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    model = AutoModelForCausalLM.from_pretrained(tiled(tiny_llama)).eval()
    right = TileLinear.forward
    monkeypatch.setattr(TileLinear, "forward", lambda self, x: 1.5 * right(self, x))
    with pytest.raises(RunFailure, match="bsr 8x8 kernels: logits are"):
        swap_kernels(model, "bsr", None, random_tokens(2, 7))


def test_kernels_that_are_not_there_are_named(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(self: TileLinear, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not implemented for 'Half'")

    model = AutoModelForCausalLM.from_pretrained(tiled(tiny_llama)).eval()
    monkeypatch.setattr(TileLinear, "forward", missing)
    with pytest.raises(
        UserError, match="PyTorch has no bsr kernels for .* in torch.float32: not implemented for 'Half'"
    ):
        swap_kernels(model, "bsr", None, random_tokens(2, 7))


def test_2_of_4_needs_a_gpu(tiny_llama: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with pytest.raises(UserError, match="no kernels for 2:4"):
        swap_kernels(model, "2:4", None, random_tokens(1, 3))


def test_both_ways_stand_side_by_side(tiny_llama: Path, tmp_path: Path):
    from tests.conftest import CONFIGS

    dense = build_tiny(CONFIGS["llama"], tmp_path / "dense")
    quick: dict[str, Any] = {"batch_sizes": "1", "prompt_tokens": 4, "new_tokens": 3, "rounds": 1}
    found = slimlm.bench(str(tiled(tiny_llama)), against=str(dense), kernels="bsr", **quick)
    assert [one.kernels for one in found.models] == ["as stored", "bsr 8x8"]
    stored, sparse = found.models
    assert stored.zeros == sparse.zeros
    assert (stored.density, sparse.density) == (None, 0.25)
    assert (stored.parameters, stored.bytes) == (sparse.parameters, sparse.bytes)
    assert sparse.verdict[0].startswith(f"{tiny_llama} with bsr 8x8 kernels: ")
    assert sparse.predicted == (None,)


def test_tiles_that_hold_too_much_are_refused_where_asked_for(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    quick: dict[str, Any] = {"batch_sizes": "1", "prompt_tokens": 4, "new_tokens": 3, "rounds": 1}
    path = tiled(tiny_llama, kept=0.9)
    with pytest.raises(UserError, match="no linear has less than 80% of its 8x8 tiles"):
        slimlm.bench(str(path), kernels="bsr", **quick)
    monkeypatch.setattr(sparse_kernels, "_pattern", lambda manifest: "8x8")
    assert [one.kernels for one in slimlm.bench(str(path), **quick).models] == ["as stored"]
