from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.helpers import best_on, damped, inputs_of, is_linear, run, stock


def cheapest_by_hand(weight: Tensor, matrix: Tensor, count: int) -> Tensor:
    """Algorithms 1 and 2: every row goes weight after weight; rows compete by the dearest weight so far."""
    prices: list[tuple[float, int, int]] = []
    for row, start in enumerate(weight):
        current, inverse, left, dearest = start.clone(), torch.linalg.inv(matrix), set(range(len(start))), 0.0
        for _ in range(len(start)):
            scores = (current.square() / inverse.diagonal()).tolist()
            column = min(left, key=scores.__getitem__)
            dearest = max(dearest, scores[column])
            prices.append((dearest, row, column))
            step = inverse[column] / inverse[column, column]
            current = current - step * current[column]
            inverse = inverse - torch.outer(inverse[:, column], step)
            left.remove(column)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    for _, row, column in sorted(prices, key=lambda price: price[0])[:count]:
        gone[row, column] = True
    return gone


def test_obc_is_the_papers_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every matrix, for what the blocks before it became; what is kept is solved for as exactly as by hand."""
    monkeypatch.setattr("slimlm.linalg.obs.TOLERANCE", 1e-5)
    path, tokens = build_tiny(CONFIGS["llama"], tmp_path / "model"), random_tokens(10, 24)
    found, _, _ = run(stream(path), tokens, tmp_path / "run", method="obc", sparsity=0.4)
    dense, pruned = stock(path), stock(tmp_path / "run" / "model")
    for index, block in enumerate(dense.model.layers[:2]):
        # Its linears are pruned by what they see together, before any of them is.
        pruned.model.layers[index].load_state_dict(block.state_dict())
        for name, module in block.named_modules():
            if is_linear(name):
                full = f"model.layers.{index}.{name}"
                (x,) = inputs_of(pruned, tokens, [full])
                weight, matrix = module.weight.double(), damped(x.flatten(0, 1).T @ x.flatten(0, 1))
                gone = cheapest_by_hand(weight, matrix, round(0.4 * weight.numel()))
                tensor = found[f"{full}.weight"]
                differing = (tensor == 0) != gone
                assert int(differing.sum()) <= 2, name  # ties that rounding breaks
                rows = ~differing.any(1)
                assert torch.allclose(tensor[rows].double(), best_on(weight, matrix, gone)[rows], atol=1e-4), name
        for name, parameter in pruned.model.layers[index].named_parameters():
            parameter.data.copy_(found[f"model.layers.{index}.{name}"])
