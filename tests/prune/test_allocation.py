"""How much each matrix takes, from figures worked out on the stock model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimlm.linalg.allocation import alpha_shares, hill_alpha, outlier_ratio, owl_shares
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.helpers import damped, gathered_gradients, inputs_of, is_linear, run, stock


def linears_of(model, block: int) -> dict[str, Tensor]:
    part = f"model.layers.{block}"
    return {
        f"{part}.{name}": module.weight for name, module in model.get_submodule(part).named_modules() if is_linear(name)
    }


def with_outliers(path: Path, block: int) -> Path:
    """Rewrite a checkpoint so that a few weights of a block are far larger than the rest."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith(f"model.layers.{block}.") and is_linear(name):
            tensor.view(-1)[::97] *= 12
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_global_shares_are_those_of_one_sorted_list_of_scores_in_nats(tmp_path: Path):
    """E[delta_r^2] w^2 / (2 [H^-1]), H the damped second moments of a linear's inputs, as K-FAC has it."""
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    model, dense = stream(path), stock(path)
    settings = {"method": "sparsegpt", "allocation": "global", "sparsity": 0.4, "fisher_samples": 100}
    _, outcome, done = run(model, random_tokens(8, 24), tmp_path / "run", **settings)
    scores: dict[str, Tensor] = {}
    for index in range(3):
        for name, found in gathered_gradients(done, index).items():
            full = f"model.layers.{index}.{name}"
            spread = torch.linalg.inv(damped(found.x.T @ found.x / len(found.x))).diagonal()
            weight = dense.get_submodule(full).weight.double()
            scores[full] = found.delta.square().mean(0)[:, None] * weight.square() / spread / 2
    every = torch.cat([score.flatten() for score in scores.values()]).sort().values
    threshold = every[round(0.4 * len(every)) - 1]
    shares = outcome.notes["allocation"]
    assert shares.keys() == scores.keys()
    for name, score in scores.items():
        low, high = ((score <= threshold * factor).double().mean() for factor in (1 - 1 / 64, 1 + 1 / 64))
        assert low - 1e-4 <= shares[name] <= high + 1e-4, name
    assert max(shares.values()) - min(shares.values()) > 0.2


def test_owl_spares_the_blocks_whose_scores_have_outliers(tmp_path: Path):
    path = with_outliers(build_tiny(CONFIGS["llama"], tmp_path / "model"), 1)
    tokens, dense, ratios = random_tokens(8, 24), stock(path), []
    _, outcome, _ = run(stream(path), tokens, tmp_path / "run", method="wanda", allocation="owl", sparsity=0.5)
    for block in range(3):
        weights = linears_of(dense, block)
        inputs = inputs_of(dense, tokens, list(weights))
        norms = [x.flatten(0, 1).norm(dim=0) for x in inputs]
        scores = [(weight.abs() * norm).flatten() for weight, norm in zip(weights.values(), norms, strict=True)]
        ratios.append(outlier_ratio(torch.cat(scores)))
    check_blocks(outcome.notes["allocation"], owl_shares(ratios, 0.5), lambda share, first: share - first)
    assert min(outcome.notes["allocation"], key=outcome.notes["allocation"].get).startswith("model.layers.1.")


def test_alphapruning_spares_the_blocks_whose_spectra_have_heavy_tails(tmp_path: Path):
    path = with_outliers(build_tiny(CONFIGS["llama"], tmp_path / "model"), 2)
    tokens, dense = random_tokens(4, 24), stock(path)
    settings = {"method": "magnitude", "allocation": "alphapruning", "sparsity": 0.5}
    _, outcome, _ = run(stream(path), tokens, tmp_path / "run", **settings)
    weights = [linears_of(dense, block).values() for block in range(3)]
    alphas = [sum(map(hill_alpha, block)) / len(block) for block in weights]
    check_blocks(outcome.notes["allocation"], alpha_shares(alphas, 0.5), lambda share, first: share / first)
    assert min(outcome.notes["allocation"], key=outcome.notes["allocation"].get).startswith("model.layers.2.")


def check_blocks(found: dict[str, float], expected: list[float], relative) -> None:
    """All matrices of a block have its share, and these stand to one another as expected."""
    for name, share in found.items():
        block, first = int(name.split(".")[2]), found["model.layers.0.self_attn.q_proj"]
        assert relative(share, first) == pytest.approx(relative(expected[block], expected[0]), abs=4e-3), name


def test_pq_takes_most_where_few_weights_carry_a_matrix(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    carried = "model.layers.1.mlp.up_proj"
    tensors[f"{carried}.weight"].view(-1)[torch.arange(1536) % 10 != 0] *= 1e-3
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    _, outcome, _ = run(
        stream(path), random_tokens(4, 24), tmp_path / "run", method="magnitude", allocation="pq", sparsity=0.5
    )
    shares = dict(outcome.notes["allocation"])
    others = shares.keys() - {carried}
    assert shares[carried] > 0.8 > 0.6 > max(shares[name] for name in others)


def test_without_data_global_compares_weights_by_their_size(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 0.5
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    found, _, _ = run(
        stream(path), random_tokens(4, 24), tmp_path / "run", method="magnitude", allocation="global", sparsity=0.3
    )
    linears = {name: tensor for name, tensor in tensors.items() if is_linear(name)}
    every = torch.cat([tensor.abs().flatten() for tensor in linears.values()]).sort().values
    threshold = every[round(0.3 * len(every)) - 1]
    for name, tensor in linears.items():
        gone, size = found[name] == 0, tensor.abs()
        assert size[gone].max() <= threshold * (1 + 1 / 64), name
        assert size[~gone].min() >= threshold * (1 - 1 / 64), name
