"""Pruning towards the dense model, against the loop that it stands for: dense and pruned model side by side."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimlm.errors import RunFailure
from slimlm.linalg.ridge import GUESS
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.helpers import (
    READERS,
    WRITERS,
    behind,
    best_on,
    damped,
    inputs_of,
    noted,
    ridge_by_hand,
    run,
    sparsegpt_mask,
    stock,
    uneven,
)


def swapped_by_hand(weight: Tensor, matrix: Tensor, pruned: Tensor) -> Tensor:
    """Row by row, a quarter of the pairs that would win change places, and the row keeps what is better."""
    found, inverse = best_on(weight, matrix, pruned), torch.linalg.inv(matrix)
    spread = (matrix.diagonal() / inverse.diagonal()).sqrt()
    gradient, masks = (weight - found) @ matrix, pruned.clone()
    for row, mask in enumerate(masks):
        gain, cost = gradient[row].square() / spread, found[row].square() * spread
        incoming = sorted(mask.nonzero().flatten().tolist(), key=lambda j: -float(gain[j]))
        outgoing = sorted((~mask).nonzero().flatten().tolist(), key=lambda j: float(cost[j]))
        wins = sum(bool(gain[p] > cost[k]) for p, k in zip(incoming, outgoing, strict=False))
        for place in range(-(-wins // 4)):
            mask[incoming[place]], mask[outgoing[place]] = False, True
    changed = best_on(weight, matrix, masks)
    before, after = (((solution - weight) @ matrix * (solution - weight)).sum(1) for solution in (found, changed))
    return torch.where((after < before)[:, None], masks, pruned)


def pruned_by_hand(weights: list[Tensor], target: Tensor, gram: Tensor, strength: float, swaps: int) -> list[Tensor]:
    matrix, found = damped(gram, max(strength, 0.01) if strength < 1e9 else 0.01), []
    for part in target.split([len(weight) for weight in weights]):
        mask = sparsegpt_mask(part, matrix, round(0.5 * part.numel()))
        for _ in range(swaps):
            mask = swapped_by_hand(part, matrix, mask)
        found.append(best_on(part, matrix, mask))
    return found


def check(found: Tensor, expected: Tensor, name: str) -> None:
    """Masks agree but for a tie or two that rounding breaks; in rows where they do, so do the weights."""
    differing = (found == 0) != (expected == 0)
    assert int(differing.sum()) <= 4, name
    rows = ~differing.any(1)
    assert torch.allclose(found[rows].double(), expected[rows], rtol=1e-3, atol=1e-3 * float(expected.std())), name


@pytest.mark.parametrize("swaps", [0, 2])
def test_slimlm_is_its_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: int):
    """Every matrix, for what those before it became; masks are refined with solutions as exact as the loop's."""
    monkeypatch.setattr("slimlm.linalg.obs.ROUGHLY", 1e-9)
    path, tokens = uneven(build_tiny(CONFIGS["llama"], tmp_path / "model")), random_tokens(20, 16)
    _, outcome, _ = run(stream(path), tokens, tmp_path / "run", method="slimlm", sparsity=0.5, swaps=swaps)
    dense, pruned = map(stock, (path, tmp_path / "run" / "model"))
    expected = pruned.state_dict()
    strengths: dict[str, float] = {}
    for block in range(3):
        part = f"model.layers.{block}"
        for norm, readers in READERS.items():
            names = [f"{part}.{reader}" for reader in readers]
            (x,), (y,) = (inputs_of(model, tokens, names[:1]) for model in (pruned, dense))
            weights = [dense.get_submodule(name).weight.double() for name in names]
            tall, guess = torch.cat(weights), strengths.get(f"{block - 1}.{norm}", GUESS)
            onto, strength = ridge_by_hand(x, y, torch.eye(x.shape[-1]), None, tall.T @ tall, guess)
            strengths[f"{block}.{norm}"] = strength
            gram = x.flatten(0, 1).T @ x.flatten(0, 1)
            for name, wanted in zip(names, pruned_by_hand(weights, tall @ onto, gram, strength, swaps), strict=True):
                check(expected[f"{name}.weight"], wanted, name)

            writer = WRITERS[norm]
            weight = dense.get_submodule(f"{part}.{writer}").weight.double()
            x, before = inputs_of(pruned, tokens, [f"{part}.{writer}", f"{part}.{norm}"])
            (after,) = inputs_of(dense, tokens, [behind(block, norm)])
            importance = 1 / after.square().mean(-1)
            guess = strengths.get(f"{block - 1}.{writer}", GUESS)
            target, strength = ridge_by_hand(x, after - before, weight, importance, None, guess)
            strengths[f"{block}.{writer}"] = strength
            weighed = (x * importance.sqrt()[..., None]).flatten(0, 1)
            (wanted,) = pruned_by_hand([weight], target, weighed.T @ weighed, strength, swaps)
            check(expected[f"{part}.{writer}.weight"], wanted, writer)
    assert outcome.notes["ridge"] == noted(strengths)
    assert any(0.01 < strength < math.inf for strength in strengths.values())  # the ridge is part of the curvature


def test_a_weight_too_large_for_the_dtype_is_named_with_what_to_change(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e7
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    named = r"tensor model\.layers\.1\.mlp\.down_proj\.weight is not finite in torch\.float16: write another --dtype"
    with pytest.raises(RunFailure, match=named):
        run(stream(path), random_tokens(20, 16), tmp_path / "run", method="slimlm", sparsity=0.5, dtype="float16")
