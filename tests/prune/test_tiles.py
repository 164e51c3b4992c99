from pathlib import Path

import pytest
import torch

from slimlm.model.ends import embed
from slimlm.prune.tiles import gathered
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.helpers import inputs_of, stock, uneven


@pytest.mark.parametrize("block", [0, 1])
def test_neurons_with_most_energy_for_what_the_block_sees_come_first(tmp_path: Path, block: int):
    """Squares of weights times their inputs' norms, relative to their mean in each linear."""
    path, tokens = uneven(build_tiny(CONFIGS["llama-biased"], tmp_path / "model")), random_tokens(8, 24)
    model, dense = stream(path), stock(path)
    seen = embed(model, list(tokens.split(4)))
    for earlier in model.blocks[:block]:
        with earlier.loaded():
            earlier.advance(seen)
    with model.blocks[block].loaded() as loaded:
        moved = gathered(loaded, seen)
    mlp, energy = dense.model.layers[block].mlp, torch.zeros(48).double()
    for linear, axis in ((mlp.gate_proj, 1), (mlp.up_proj, 1), (mlp.down_proj, 0)):
        name = next(name for name, module in dense.named_modules() if module is linear)
        (x,) = inputs_of(dense, tokens, [name])
        squares = (linear.weight.double() * x.flatten(0, 1).norm(dim=0)).square()
        energy += squares.sum(axis) / squares.mean()
    order = energy.argsort(descending=True)
    assert torch.equal(moved["mlp.down_proj.weight"], mlp.down_proj.weight[:, order])
    for linear in ("gate_proj", "up_proj"):
        assert torch.equal(moved[f"mlp.{linear}.weight"], mlp.get_submodule(linear).weight[order])
        assert torch.equal(moved[f"mlp.{linear}.bias"], mlp.get_submodule(linear).bias[order])
    blind = gathered_without_data(model, block)
    assert not torch.equal(blind, moved["mlp.down_proj.weight"])


def gathered_without_data(model, block: int) -> torch.Tensor:
    with model.blocks[block].loaded() as loaded:
        return gathered(loaded)["mlp.down_proj.weight"]
