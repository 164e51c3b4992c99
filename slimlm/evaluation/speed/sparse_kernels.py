"""A pruned model's linears by kernels that leave its zeros out: PyTorch's block-sparse rows (BSR) for tiles, its
semi-structured products for 2:4 on GPUs.

Knows no family: whatever is an `nn.Linear` counts. Experts that are packed into one parameter stay as they are.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from slimlm.checkpoint.manifest import Manifest, steps_in
from slimlm.errors import RunFailure, UserError, one_line
from slimlm.linalg.masks import Tile

SQUARES: tuple[Tile, ...] = ((64, 64), (32, 32), (16, 16), (8, 8), (4, 4))
GATHERED = 0.9  # of a matrix's zeros that are in tiles of zeros only, where it was pruned in such tiles
LOW = 0.8  # share of tiles that hold something, above which leaving the others out cannot pay
FAR, FAR_IN_HALF = 0.01, 0.3  # relative difference of logits that no rounding explains, of 32 and of 16 bits
BSR_SAYS = "Sparse (BSR|CSR) tensor support is in beta"
SEMI_SAYS = "The PyTorch API of SparseSemiStructuredTensor"


@dataclass(frozen=True)
class Swapped:
    """What was done to a model. kernels: its name for people. density: share of the weights of the linears concerned
    that a product still goes through. linears: how many, of all. difference: of its logits, relative to those before.
    """

    kernels: str
    density: float
    linears: int
    of: int
    difference: float


class TileLinear(nn.Module):
    """A linear whose weight is kept as tiles, in the dtype that kernels have: on CPUs float32 alone."""

    weight: Tensor

    def __init__(self, dense: nn.Linear, tile: Tile) -> None:
        super().__init__()
        weight = dense.weight.detach()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", BSR_SAYS, UserWarning)
            sparse = (weight.float() if weight.device.type == "cpu" else weight).to_sparse_bsr(tile)
        self.register_buffer("weight", sparse)
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]"""
        product = linear(x.to(self.weight.dtype).flatten(0, -2), self.weight)
        found: Tensor = product.to(x.dtype).unflatten(0, x.shape[:-1])
        return found if self.bias is None else found + self.bias


def kernels_for(manifest: Manifest | None, device: torch.device) -> str | None:
    """What a checkpoint's own manifest calls for: "bsr", "2:4", or nothing that this device has."""
    if _pattern(manifest) == "2:4":
        return "2:4" if device.type == "cuda" else None
    return "bsr" if tile_said(manifest) else None


def tile_said(manifest: Manifest | None) -> Tile | None:
    """Outputs and inputs of the tiles that a manifest says, in its last step that has a pattern; of those that are not
    square, which kernels do not take, the largest squares that make them up."""
    sizes = re.fullmatch(r"(\d+)x(\d+)", _pattern(manifest))
    if not sizes:
        return None
    side = math.gcd(int(sizes[1]), int(sizes[2]))
    return side, side


def _pattern(manifest: Manifest | None) -> str:
    try:
        patterns = [step["pattern"] for step in steps_in(manifest) if step.get("pattern")]
    except (KeyError, TypeError, AttributeError):  # no manifest of this version's
        return ""
    return str(patterns[-1]) if patterns else ""


def density(weight: Tensor, tile: Tile) -> float:
    """Share of a weight's tiles that are not all zeros; weight: [out, in], of whole tiles."""
    held = (weight != 0).unflatten(1, (-1, tile[1])).any(2).unflatten(0, (-1, tile[0])).any(1)
    return float(held.double().mean())


def tile_found(weights: Sequence[Tensor]) -> Tile | None:
    """The largest square of SQUARES in which most zeros of weights: [out, in] gather; None where there is none."""
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    for tile in SQUARES:
        whole = [weight for weight in weights if _fits(weight, tile)]
        gathered = sum((1 - density(weight, tile)) * weight.numel() for weight in whole)
        if zeros and gathered >= GATHERED * zeros:
            return tile
    return None


def is_2_of_4(weight: Tensor) -> bool:
    """Whether of every four neighbouring inputs at least two are zeros; weight: [out, in]."""
    return weight.shape[1] % 4 == 0 and bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())


@torch.inference_mode()
def swap_kernels(model: PreTrainedModel, kernels: str, manifest: Manifest | None, tokens: Tensor) -> Swapped:
    """Put sparse kernels into a loaded model, which then computes what it did: logits of tokens: [batch, time] say so.

    kernels: "bsr" or "2:4". Raises UserError for a model that is not pruned so, or a device without such kernels, and
    RunFailure where the logits come out as others.
    """
    before = model(input_ids=tokens, use_cache=False).logits.float()
    try:
        swapped = _tiles(model, manifest) if kernels == "bsr" else _two_of_four(model)
        after = model(input_ids=tokens, use_cache=False).logits.float()
    except RuntimeError as error:  # NotImplementedError is one
        raise UserError(
            f"PyTorch has no {kernels} kernels for {model.name_or_path} in {model.dtype}: {one_line(error)}"
        ) from error
    difference = float((after - before).norm() / before.norm())
    if not difference <= (FAR if model.dtype == torch.float32 else FAR_IN_HALF):
        raise RunFailure(f"{swapped.kernels} kernels: logits are {difference:.3f} off, relative to those without")
    return Swapped(swapped.kernels, swapped.density, swapped.linears, swapped.of, difference)


def _tiles(model: PreTrainedModel, manifest: Manifest | None) -> Swapped:
    linears = _linears(model)
    tile = tile_said(manifest) or tile_found([module.weight for module in linears.values()])
    if tile is None:
        raise UserError(f"{model.name_or_path} has no tiles of zeros, which --kernels bsr needs (--pattern 16x16)")
    densities = {name: density(one.weight, tile) for name, one in linears.items() if _fits(one.weight, tile)}
    chosen = {name: share for name, share in densities.items() if share <= LOW}
    if not chosen:
        raise UserError(f"{model.name_or_path}: no linear has less than {LOW:.0%} of its {tile[0]}x{tile[1]} tiles")
    sizes = {name: linears[name].weight.numel() for name in chosen}
    _replace(model, chosen, lambda dense: TileLinear(dense, tile))
    share = sum(chosen[name] * size for name, size in sizes.items()) / sum(sizes.values())
    return Swapped(f"bsr {tile[0]}x{tile[1]}", share, len(chosen), len(linears), 0.0)


def _two_of_four(model: PreTrainedModel) -> Swapped:
    refuse_2_of_4_without_gpu(model.device)
    linears = _linears(model)
    chosen = {name: 0.5 for name, one in linears.items() if is_2_of_4(one.weight)}
    if not chosen:
        raise UserError(f"{model.name_or_path} has no linear with 2:4 zeros, which --kernels 2:4 needs")
    _replace(model, chosen, _semi_structured)
    return Swapped("2:4", 0.5, len(chosen), len(linears), 0.0)


def refuse_2_of_4_without_gpu(device: torch.device) -> None:
    """Raises UserError on a device that has no such kernels."""
    if device.type != "cuda":
        raise UserError(f"--kernels 2:4: {device} has no kernels for 2:4, NVIDIA's GPUs have: give --device cuda")


def _semi_structured(dense: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SEMI_SAYS, UserWarning)
        dense.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(dense.weight.detach()), requires_grad=False)
    return dense


def _replace(model: nn.Module, chosen: Mapping[str, float], made: Callable[[nn.Linear], nn.Module]) -> None:
    for name in chosen:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        setattr(model.get_submodule(owner), leaf, made(module))


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _fits(weight: Tensor, tile: Tile) -> bool:
    return weight.shape[0] % tile[0] == 0 and weight.shape[1] % tile[1] == 0
