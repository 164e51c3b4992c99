from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimlm.linalg.hessian import DAMPING
from slimlm.prune import masks, updates
from slimlm.prune.allocation import global_scores
from slimlm.prune.group import Row
from slimlm.recipe import one_step
from slimlm.stages import compress
from slimlm.statistics.token_gradients import TokenGradients
from tests.conftest import build_tiny
from tests.families.configs import family_config


def scores_of(gradients: dict[str, TokenGradients], weights: dict[str, torch.Tensor], curvature: str):
    row = Row(curvature, masks.obs, updates.joint if curvature == "gram" else "summed")
    block = SimpleNamespace(path="block", family=SimpleNamespace(linears=tuple(weights)), matrix=weights.__getitem__)
    return dict(global_scores(block, gradients, row, damping=0.01))


@pytest.mark.parametrize("curvature", ["gram", "fisher", "block-fisher"])
def test_an_expert_counts_by_the_share_of_tokens_that_reach_it(curvature: str):
    """One that every eighth token reaches scores an eighth of the same one reached by all."""
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(800, size, generator=generator).double() for size in (6, 4))
    weights = {name: torch.randn(4, 6, generator=generator) for name in ("all", "expert")}
    weights["expert"] = weights["all"]
    some = slice(None, None, 8)
    rare = TokenGradients(x[some], delta[some])
    scores = scores_of({"all": TokenGradients(x, delta), "expert": rare}, weights, curvature)
    alone = scores_of({"expert": rare}, {"expert": weights["expert"]}, curvature)
    assert torch.allclose(scores["expert"], alone["expert"] / 8, rtol=1e-6)
    assert float((scores["expert"] / scores["all"]).mean()) == pytest.approx(1 / 8, rel=0.15)


def test_the_scores_of_a_gram_are_kfacs():
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(50, 5, generator=generator).double(), torch.randn(50, 3, generator=generator).double()
    weight = torch.randn(3, 5, generator=generator)
    gram = x.T @ x / len(x)
    inverse = torch.linalg.inv(gram + DAMPING * gram.diagonal().mean() * torch.eye(5))
    wanted = [
        [float((delta[:, r] ** 2).mean() * weight[r, c] ** 2 / inverse[c, c] / 2) for c in range(5)] for r in range(3)
    ]
    found = scores_of({"linear": TokenGradients(x, delta)}, {"linear": weight}, "gram")["linear"]
    assert torch.allclose(found, torch.tensor(wanted).double(), rtol=1e-6)


def test_a_matrix_that_no_token_reached_takes_its_uniform_share(tmp_path: Path):
    config = family_config("mixtral")
    config.num_experts_per_tok = 1
    path = build_tiny(config, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    for tensor in tensors.values():
        if tensor.shape == (4, 32):  # the router: one of two experts that are each other's opposite
            tensor[1] = -tensor[0]
            tensor[2:] = 0
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane. " * 60)
    recipe = one_step(
        **{
            "model": str(path), "method": "sparsegpt", "allocation": "global", "sparsity": 0.5, "batch_size": 2,
            "dataset": str(tmp_path / "text.txt"), "num_calibration_samples": 5, "max_seq_length": 24,
            "output_dir": str(tmp_path / "out"), "measure": False,
        }
    )  # fmt: skip
    manifest = compress(recipe).manifest
    shares, starved = manifest["method"]["allocation"], manifest["method"].get("starved_experts", {})
    unreached = [name for name, tokens in starved.items() if tokens == 0]
    assert len(unreached) == 3 * 2 * 2  # of three blocks, two experts' two matrices
    assert all(shares[name] == pytest.approx(0.5, abs=0.01) for name in unreached)
    assert all(share <= 0.99 for share in shares.values())
