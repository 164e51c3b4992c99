import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimlm.calibration import load_windows
from slimlm.checkpoint.journal import Journal
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.skeleton import load_tokenizer
from slimlm.errors import RunFailure, UserError
from slimlm.linalg.hessian import SingularCurvature, hessian, with_gradients
from slimlm.linalg.masks import pooled
from slimlm.model.ends import embed
from slimlm.model.saving import Saver
from slimlm.models import open_model
from slimlm.prune import masks, updates
from slimlm.prune import run as pruning
from slimlm.prune.curvature import row_fisher
from slimlm.prune.group import Row, prune
from slimlm.prune.quota import Quota
from slimlm.prune.tiles import gathered
from slimlm.recipe import Recipe, one_step
from slimlm.stages import compress
from slimlm.statistics.token_gradients import TokenGradients
from tests.conftest import CONFIGS, build_tiny, random_tokens, stream
from tests.families.configs import family_config
from tests.helpers import gathered_gradients, run_at

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)
    return tmp_path / "text.txt"


def recipe_for(path: Path, text: Path, output: Path, **settings) -> Recipe:
    values = {"sparsity": 0.5} if "pattern" not in settings else {}
    return one_step(
        **{
            "model": str(path), "dataset": str(text), "num_calibration_samples": 5, "max_seq_length": 24,
            "batch_size": 2, "eval_windows": 2, "eval_text": str(text), "output_dir": str(output), **values, **settings,
        }
    )  # fmt: skip


def keep_in(inputs: dict[str, list[torch.Tensor]], name: str):
    return lambda module, args: inputs.setdefault(name, []).append(args[0])


def by_the_paper(
    path: Path, tokens: torch.Tensor, prune: Callable[[torch.nn.Module, torch.Tensor], None]
) -> dict[str, torch.Tensor]:
    """Block after block, each linear by itself, on its inputs [tokens, in] in fp64 through the pruned blocks before."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for block in model.model.layers:
        inputs: dict[str, list[torch.Tensor]] = {}
        linears = {name: module for name, module in block.named_modules() if name.endswith(LINEAR)}
        handles = [module.register_forward_pre_hook(keep_in(inputs, name)) for name, module in linears.items()]
        with torch.no_grad():
            model(tokens)
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            prune(module, torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs[name]]).double())
    return model.state_dict()


def wanda_by_the_paper(module: torch.nn.Module, x: torch.Tensor, sparsity: float) -> None:
    """Algorithm 1 of the paper with plain loops."""
    for row in module.weight.data:
        scores = [abs(float(w)) * float(x[:, j].norm()) for j, w in enumerate(row)]
        for j in sorted(range(len(scores)), key=lambda j: scores[j])[: round(sparsity * len(scores))]:
            row[j] = 0


def test_wanda_is_the_papers_algorithm(tmp_path: Path, text: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    recipe = recipe_for(path, text, tmp_path / "out", method="wanda")
    compress(recipe)
    tokens = load_windows(str(text), load_tokenizer(path), 5, 24).tokens
    expected = by_the_paper(path, tokens, partial(wanda_by_the_paper, sparsity=0.5))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def sparsegpt_by_the_paper(module: torch.nn.Module, x: torch.Tensor, sparsity: float) -> None:
    """Algorithm 1, its inverse computed anew for every column."""
    gram = x.T @ x
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight, columns = module.weight.data.double(), len(gram)  # all columns are one block of 128
    scores = torch.stack([weight[:, c].square() / torch.linalg.inv(gram[c:, c:])[0, 0] for c in range(columns)], dim=1)
    gone = torch.zeros(weight.numel(), dtype=torch.bool)
    gone[scores.flatten().argsort(stable=True)[: round(sparsity * weight.numel())]] = True
    gone = gone.view_as(weight)
    for c in range(columns):
        left = torch.linalg.inv(gram[c:, c:])
        weight[:, c:] -= (weight[:, c] * gone[:, c] / left[0, 0])[:, None] * left[0]
    module.weight.data = weight.masked_fill(gone, 0).float()


def test_sparsegpt_is_the_papers_algorithm(tmp_path: Path, text: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    compress(recipe_for(path, text, tmp_path / "out", method="sparsegpt", sparsity=0.4))
    tokens = load_windows(str(text), load_tokenizer(path), 5, 24).tokens
    expected = by_the_paper(path, tokens, partial(sparsegpt_by_the_paper, sparsity=0.4))
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor == 0, expected[name] == 0), name
        assert torch.allclose(tensor, expected[name], atol=1e-5), name


@pytest.mark.parametrize("method", ["sparsegpt", "obc", "slimlm", "wanda", "magnitude"])
def test_exactly_the_requested_number_of_zeros_in_every_matrix(tmp_path: Path, text: Path, method: str):
    path = build_tiny(CONFIGS["llama-biased"], tmp_path / "model")
    compress(recipe_for(path, text, tmp_path / "out", method=method, sparsity=0.37))
    before, after = (load_file(directory / "model.safetensors") for directory in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.endswith(".weight") and name.split(".")[-2] in LINEAR:
            assert int((tensor == 0).sum()) == round(0.37 * tensor.numel()), name


def test_aiming_at_the_dense_model_repairs_what_went_wrong_before(tmp_path: Path, text: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    numpy.save(tmp_path / "tokens.npy", numpy.random.default_rng(0).integers(0, 90, (60, 32)))
    errors = {}
    for name, settings in {
        "sparsegpt": {"method": "sparsegpt"},
        "joint": {"method": "slimlm", "refit": False},
        "slimlm": {"method": "slimlm"},
    }.items():
        manifest = compress(
            recipe_for(path, tmp_path / "tokens.npy", tmp_path / name, num_calibration_samples=60, max_seq_length=32,
                       eval_text=str(text), eval_windows=60, **settings)
        ).manifest  # fmt: skip
        errors[name] = [block["relative_error"] for block in manifest["blocks"]]
        if name == "slimlm":
            assert set(manifest["method"]) == {"ridge", "damping", "predicted_error", "head"}
    assert errors["slimlm"][-1] < errors["joint"][-1] < errors["sparsegpt"][-1]


def test_a_layer_whose_gram_is_not_definite_says_what_damping_it_needed(tmp_path: Path, text: Path, monkeypatch):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")

    def rounded(gram, damping, upper_only):
        if len(gram) == 48:  # of what down_proj reads
            gram.diagonal().sub_(gram.diagonal().min() + 0.05 * gram.diagonal().mean())
            gram.diagonal().clamp_(min=1e-9)
        return hessian(gram, damping, upper_only)

    monkeypatch.setattr("slimlm.prune.curvature.hessian", rounded)
    manifest = compress(recipe_for(path, text, tmp_path / "out", method="sparsegpt")).manifest
    damping = manifest["method"]["damping"]
    needed = [damping.pop(f"model.layers.{index}.mlp.down_proj") for index in range(3)]
    assert all(value in (0.1, 1, 10, 100) for value in map(partial(round, ndigits=9), needed))
    assert len(damping) == 9
    assert set(damping.values()) == {0.01}


def test_a_hopeless_layer_stops_the_run_with_its_name(tmp_path: Path, text: Path, monkeypatch):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")

    def hopeless(gram, damping, upper_only):
        raise SingularCurvature("the Gram matrix of its inputs is singular")

    monkeypatch.setattr("slimlm.prune.curvature.hessian", hopeless)
    with pytest.raises(RunFailure, match=r"model\.layers\.0\.self_attn\.q_proj cannot be pruned: the Gram"):
        compress(recipe_for(path, text, tmp_path / "out", method="sparsegpt"))


def test_magnitude_zeroes_the_smallest_of_each_matrix_and_leaves_the_rest_alone(tmp_path: Path, text: Path):
    path = build_tiny(CONFIGS["llama-biased"], tmp_path / "model")
    manifest = compress(recipe_for(path, text, tmp_path / "out", method="magnitude", sparsity=0.3)).manifest
    before, after = (load_file(directory / "model.safetensors") for directory in (path, tmp_path / "out"))
    for name, tensor in before.items():
        if name.endswith(".weight") and name.split(".")[-2] in LINEAR:
            pruned = after[name] == 0
            assert int(pruned.sum()) == round(0.3 * tensor.numel())
            assert tensor[pruned].abs().max() <= tensor[~pruned].abs().min()
            assert torch.equal(after[name][~pruned], tensor[~pruned])
        else:
            assert torch.equal(after[name], tensor)
    assert manifest["calibration"] is None
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.3, abs=1e-3)
    assert manifest["sparsity"]["parameters_removed"] == 0


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in sorted(CONFIGS) for method in ("wanda", "slimlm")]
    + [("llama", method) for method in ("magnitude", "sparsegpt", "obc", "mfac")],
)
def test_a_pattern_holds_in_every_group_of_every_matrix(tmp_path: Path, text: Path, name: str, method: str):
    path = build_tiny(CONFIGS[name], tmp_path / "model")
    manifest = compress(recipe_for(path, text, tmp_path / "out", method=method, pattern="2:4")).manifest
    for tensor_name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if tensor_name.endswith(".weight") and tensor_name.split(".")[-2] in LINEAR:
            assert ((tensor.view(-1, 4) == 0).sum(1) == 2).all()
    assert manifest["sparsity"] == {
        "requested": 0.5,
        "of": "weights in pruned matrices",
        "achieved": 0.5,
        "parameters_removed": 0.0,
        "zeros_in_pruned_matrices": 0.5,
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Zeros take as much room" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("method", ["magnitude", "wanda", pytest.param("sparsegpt", marks=pytest.mark.slow), "slimlm"])
def test_death_at_any_step_is_survived_with_the_same_bytes(tmp_path: Path, text: Path, monkeypatch, method: str):
    monkeypatch.setattr(Saver, "seconds", 0.0)  # behind every block
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    compress(recipe_for(path, text, tmp_path / "whole", method=method))
    reference = (tmp_path / "whole" / "model.safetensors").read_bytes()
    figures = json.loads((tmp_path / "whole" / "slimlm.json").read_text())["method"]
    steps = {"magnitude": 1 + 3 + 1 + 3 + 1, "slimlm": 1 + 1 + 1 + 6 + 2 + 1}.get(method, 1 + 3 + 1 + 6 + 1)
    for number in range(1, steps + 1):
        recipe = recipe_for(path, text, tmp_path / f"out{number}", method=method)
        with monkeypatch.context() as patch:
            die_after_record(patch, number)
            with pytest.raises(KeyboardInterrupt):
                compress(recipe)
        output = compress(recipe, resume=True).output_dir
        assert (output / "model.safetensors").read_bytes() == reference
        assert json.loads((output / "slimlm.json").read_text())["method"] == figures
        assert json.loads((output / "slimlm.json").read_text())["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3)


def test_a_finished_block_that_was_damaged_is_pruned_again(tmp_path: Path, text: Path, monkeypatch):
    monkeypatch.setattr(Saver, "seconds", 0.0)
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    compress(recipe_for(path, text, tmp_path / "whole", method="wanda"))
    recipe = recipe_for(path, text, tmp_path / "out", method="wanda")
    with monkeypatch.context() as patch:
        die_after_record(patch, 8)  # two blocks are written, and the stream is past them
        with pytest.raises(KeyboardInterrupt):
            compress(recipe)
    shard = tmp_path / "out.partial" / "model" / "model.safetensors"
    place = Checkpoint(shard.parent).tensors["model.layers.0.mlp.up_proj.weight"]
    with shard.open("r+b") as file:
        file.seek(place.offset)
        file.write(b"damaged!")
    compress(recipe, resume=True)
    assert (tmp_path / "out" / shard.name).read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


def die_after_record(patch: pytest.MonkeyPatch, number: int) -> None:
    original, calls = Journal.commit, iter(range(1, 100))

    def dying(self, step, **facts):
        original(self, step, **facts)
        if next(calls) == number:
            raise KeyboardInterrupt

    patch.setattr(Journal, "commit", dying)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "slimlm", "mfac"])
def test_tiles_go_or_stay_as_a_whole(tmp_path: Path, text: Path, method: str):
    path = build_tiny(CONFIGS["llama-biased"], tmp_path / "model")
    recipe = recipe_for(path, text, tmp_path / "out", method=method, sparsity=0.4, pattern="4x8")
    compress(recipe)
    gone = tiles = 0
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if name.endswith(".weight") and name.split(".")[-2] in LINEAR:
            zeros = pooled((tensor == 0).float(), (4, 8))
            assert set(zeros.unique().tolist()) == {0, 32}, name
            gone, tiles = gone + int((zeros == 32).sum()), tiles + zeros.numel()
            assert abs(int((zeros == 32).sum()) - 0.4 * zeros.numel()) <= 1
    assert gone == round(0.4 * tiles)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama-biased", "phi3", "gpt2", "opt", "bloom", "qwen3_moe"])
def test_neurons_in_another_order_compute_the_same(tmp_path: Path, name: str):
    path = build_tiny(CONFIGS[name] if name in CONFIGS else family_config(name), tmp_path / "model")
    model, tokens = stream(path), random_tokens(3, 16)
    seen = embed(model, [tokens])
    with model.blocks[0].loaded() as block:
        before = block.run(seen.hidden[0], seen.calls[0][0])
        moved = {name: tensor.clone() for name, tensor in gathered(block, seen).items()}
        with block.placed(moved):
            after = block.run(seen.hidden[0], seen.calls[0][0])
        weights = block.weights()
        changed = {name for name, tensor in moved.items() if not torch.equal(tensor, weights[name])}
    assert torch.allclose(before, after, atol=1e-5)
    assert changed == moved.keys()
    assert bool(moved) == (model.family.experts is None)


def test_neurons_are_ordered_by_their_energy_unless_that_is_turned_off(tmp_path: Path, text: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    compress(recipe_for(path, text, tmp_path / "out", method="magnitude", sparsity=0.5, pattern="4x4", reorder=False))
    kept = load_file(tmp_path / "out" / "model.safetensors")
    dense = load_file(path / "model.safetensors")
    for name, tensor in kept.items():
        assert torch.equal(tensor[tensor != 0], dense[name][tensor != 0]), name
    compress(recipe_for(path, text, tmp_path / "ordered", method="magnitude", sparsity=0.5, pattern="4x4"))
    ordered = load_file(tmp_path / "ordered" / "model.safetensors")
    down, name = ordered["model.layers.0.mlp.down_proj.weight"], "model.layers.0.mlp.down_proj.weight"
    mlp = [dense[f"model.layers.0.mlp.{linear}.weight"].square() for linear in ("gate_proj", "up_proj")]
    energy = sum(part.sum(1) / part.mean() for part in mlp) + dense[name].square().sum(0) / dense[name].square().mean()
    order = energy.argsort(descending=True)
    assert torch.equal(down[down != 0], dense[name][:, order][down != 0])


def test_bad_patterns_are_refused_by_name(tmp_path: Path, text: Path):
    config = copy.deepcopy(CONFIGS["mistral"])
    config.intermediate_size = 50
    path = build_tiny(config, tmp_path / "model")
    with pytest.raises(UserError, match="50 inputs, which pattern 2:4 does not divide"):
        compress(recipe_for(path, text, tmp_path / "out", method="wanda", pattern="2:4"))
    with pytest.raises(UserError, match="magnitude does not read round_to"):
        compress(recipe_for(path, text, tmp_path / "out", method="magnitude", round_to=8))
    with pytest.raises(UserError, match="slice does not read pattern"):
        compress(recipe_for(path, text, tmp_path / "out", method="slice", pattern="2:4"))
    with pytest.raises(UserError, match="50 outputs, which pattern 4x2 does not divide"):
        compress(recipe_for(path, text, tmp_path / "out", method="wanda", pattern="4x2", sparsity=0.5))
    with pytest.raises(UserError, match="'sparsity' is not given"):
        recipe_for(path, text, tmp_path / "out", method="wanda", pattern="4x2")
    for pattern, message in [("4:2", "N must be smaller"), ("0:4", "pattern"), ("x", "pattern"), ("2:", "pattern")]:
        with pytest.raises(UserError, match=message):
            recipe_for(path, text, tmp_path / "out", method="wanda", pattern=pattern)
    with pytest.raises(UserError, match=r"pattern 2:4 is a sparsity of 0\.5, not 0\.3"):
        recipe_for(path, text, tmp_path / "out", method="wanda", pattern="2:4", sparsity=0.3)


@pytest.mark.parametrize("method", ["mfac", "woodfisher"])
def test_fisher_methods_prune_as_many_over_the_whole_model_and_survive_death(
    tmp_path: Path, text: Path, monkeypatch, method: str
):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    manifest = compress(recipe_for(path, text, tmp_path / "whole", method=method)).manifest
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-6)
    shares = manifest["method"]["allocation"]
    assert len(shares) == 3 * 7
    assert len(set(shares.values())) > 7
    reference = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for number in (4, 6, 9):
        recipe = recipe_for(path, text, tmp_path / f"out{number}", method=method)
        with monkeypatch.context() as patch:
            die_after_record(patch, number)
            with pytest.raises(KeyboardInterrupt):
                compress(recipe)
        output = compress(recipe, resume=True).output_dir
        assert (output / "model.safetensors").read_bytes() == reference


@pytest.mark.parametrize("size", [0, 4])
def test_gradients_of_sequences_are_sums_over_their_tokens(size: int):
    """Inverse, diagonal and mean diagonal against the Fisher matrix of each row written out."""
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(5 * 3, width, generator=generator).double() for width in (8, 6))
    gradients = TokenGradients(x, delta, window=3)
    whole = torch.einsum("sto,sti->soi", delta.view(5, 3, 6), x.view(5, 3, 8))
    assert gradients.mean_square() == pytest.approx(float(whole.square().mean()), rel=1e-12)
    inverse = row_fisher(gradients, 0.3, blocks=False)
    inverse = replace(inverse, block=size)
    vector = torch.randn(6, 8, generator=generator).double()
    for row in range(6):
        fisher = whole[:, row].T @ whole[:, row] / 5
        if size:
            fisher = torch.block_diag(*(fisher[at : at + size, at : at + size] for at in range(0, 8, size)))
        dense = torch.linalg.inv(fisher + inverse.damping * torch.eye(8, dtype=torch.float64))
        assert torch.allclose(inverse.diagonal()[row], dense.diagonal(), rtol=1e-10)
        assert torch.allclose(inverse.times(vector)[row], dense @ vector[row], rtol=1e-10)


@pytest.mark.parametrize("method", ["mfac", "woodfisher"])
def test_fisher_methods_take_gradients_of_sequences(tmp_path: Path, text: Path, method: str):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    more = {"method": method, "fisher_unit": "sequence", "fisher_samples": 6}
    manifest = compress(recipe_for(path, text, tmp_path / "out", **more)).manifest
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(UserError, match=r"gram\+fisher puts gradients of tokens"):
        compress(recipe_for(path, text, tmp_path / "no", **{**more, "method": "slimlm", "curvature": "gram+fisher"}))


@pytest.mark.parametrize("allocation", ["uniform", "global", "owl", "alphapruning", "pq", "solved"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "slimlm"])
def test_every_allocation_prunes_as_many_in_all(tmp_path: Path, text: Path, method: str, allocation: str):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    recipe = recipe_for(path, text, tmp_path / "out", method=method, allocation=allocation, sparsity=0.6)
    manifest = compress(recipe).manifest
    after = load_file(tmp_path / "out" / "model.safetensors")
    linears = {
        name: tensor for name, tensor in after.items() if name.endswith(".weight") and name.split(".")[-2] in LINEAR
    }
    zeros = {name: int((tensor == 0).sum()) for name, tensor in linears.items()}
    assert sum(zeros.values()) == sum(round(0.6 * tensor.numel()) for tensor in linears.values())
    if allocation != "uniform":
        shares = manifest["method"]["allocation"]
        assert {
            name.removesuffix(".weight"): pytest.approx(zeros[name] / linears[name].numel(), abs=1e-4) for name in zeros
        } == shares
        assert len(set(shares.values())) > 1


def test_a_pattern_leaves_nothing_to_allocate(tmp_path: Path, text: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    with pytest.raises(UserError, match="wanda does not read allocation here: a pattern prunes every matrix alike"):
        compress(recipe_for(path, text, tmp_path / "out", method="wanda", pattern="2:4", allocation="owl"))


def test_token_gradients_are_autograds(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    """x and delta of all tokens give the gradient of every weight, as autograd has it, but for bf16."""
    monkeypatch.setattr("slimlm.device.product_dtype", lambda device, dtype: dtype)
    path = build_tiny(CONFIGS["llama-biased"], tmp_path / "model")
    tokens = load_windows(str(text), load_tokenizer(path), 4, 24).tokens
    model = open_model(path, torch.device("cpu"), "fast")
    settings = {"method": "mfac", "sparsity": 0.5, "fisher_samples": 10_000, "fisher_labels": "text"}
    run = run_at(model, list(tokens.split(2)), tmp_path / "run", **settings)
    pruning._gather_gradients(run)
    found = [gathered_gradients(run, index) for index in range(3)]
    dense = AutoModelForCausalLM.from_pretrained(path).eval()
    logits = dense(tokens).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").backward()
    for index, block in enumerate(dense.model.layers):
        for name, gradients in found[index].items():
            assert len(gradients.x) == tokens.numel()
            expected = block.get_submodule(name).weight.grad.double()
            error = (gradients.delta.T @ gradients.x - expected).norm() / expected.norm()
            assert error < 0.01, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "wanda", "mask": "columns"}, "mask columns needs a curvature of gram or gram.fisher, not diagonal"),
        ({"method": "magnitude", "update": "joint"}, "update joint needs a curvature of gram"),
        ({"method": "sparsegpt", "swaps": 2}, "sparsegpt does not read swaps here: only the mask of update joint"),
        ({"method": "mfac", "mask": "wanda"}, "mask wanda needs a curvature of diagonal"),
        (
            {"method": "obc", "pattern": "4x4", "sparsity": 0.5},
            "mask greedy takes weights one by one, not tiles of 4x4",
        ),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path: Path, text: Path, settings: dict, message: str):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    with pytest.raises(UserError, match=message):
        compress(recipe_for(path, text, tmp_path / "out", **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "slimlm", "curvature": "gram+fisher"},
        {"method": "sparsegpt", "curvature": "gram+fisher", "update": "joint", "swaps": 1},
        {"method": "sparsegpt", "mask": "magnitude"},
        {"method": "sparsegpt", "mask": "obs", "update": "summed"},
        {"method": "magnitude", "curvature": "gram", "update": "joint"},
        {"method": "wanda", "curvature": "gram", "update": "left-to-right"},
    ],
)
def test_curvature_mask_and_update_combine_by_recipe(tmp_path: Path, text: Path, settings: dict):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    manifest = compress(recipe_for(path, text, tmp_path / "out", **settings)).manifest
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3)


def test_dead_inputs_go_first_whatever_the_scale_of_the_gram():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 16, generator=generator).double()
    x[:, 3] = 0
    weight = torch.randn(64, 16, generator=generator).double()
    for scale in (1.0, 1e-6):
        curvature = hessian(scale * x.T @ x)
        for row in (
            Row("gram", masks.columns, updates.left_to_right),
            Row("gram", masks.greedy, updates.joint),
            Row("gram", masks.columns, updates.joint, swaps=2),
        ):
            found, pruned = prune(weight, curvature, Quota((64,), (512,)), row)
            assert int(pruned.sum()) == int((found == 0).sum()) == 512
            assert pruned[:, 3].all()


@pytest.mark.parametrize("method", ["sparsegpt", "slimlm"])
def test_what_is_computed_is_written_in_the_dtype_asked_for(tmp_path: Path, text: Path, method: str):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    compress(recipe_for(path, text, tmp_path / "out", method=method, dtype="float32"))
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("settings", [{"method": "slimlm"}, {"method": "slice", "sparsity": 0.1}])
def test_what_is_fitted_is_written_finer_than_the_device_computes(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, settings: dict
):
    """As on a GPU, which computes in the checkpoint's dtype."""
    path = build_tiny(CONFIGS["llama"], tmp_path / "model", torch.bfloat16)
    monkeypatch.setattr(
        "slimlm.check.open_model", lambda path, device, _, trust: open_model(path, device, "stock", trust)
    )
    compress(recipe_for(path, text, tmp_path / "out", dtype="float32", **settings))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("self_attn.v_proj", "mlp.down_proj"):  # what runs before other fits, and what does not
        weight = weights[f"model.layers.1.{name}.weight"]
        assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("method", ["mfac", "woodfisher", "slimlm"])
@pytest.mark.parametrize("samples", [20, 500])
def test_matrices_nothing_depends_on_are_no_obstacle(tmp_path: Path, text: Path, method: str, samples: int):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    more = {"curvature": "gram+fisher"} if method == "slimlm" else {}
    recipe = recipe_for(path, text, tmp_path / "out", method=method, fisher_samples=samples, **more)
    assert compress(recipe).manifest["sparsity"]["achieved"] >= 0.5 - 1e-3


@pytest.mark.parametrize("curvature", ["gram", "gram+fisher"])
def test_rows_solved_in_parts_are_as_if_solved_together(monkeypatch, curvature: str):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 16, generator=generator).double()
    weight, delta = (
        torch.randn(10, 16, generator=generator).double(),
        torch.randn(100, 10, generator=generator).double(),
    )
    known = hessian(x.T @ x)
    known = with_gradients(known, x, delta) if curvature == "gram+fisher" else known
    row, quota = Row(curvature, masks.columns, updates.joint, swaps=2), Quota((6, 4), (40, 30))
    whole, mask = prune(weight, known, quota, row)
    monkeypatch.setattr("slimlm.prune.updates.CHUNK_ELEMENTS", 3 * 16)
    parts, same = prune(weight, known, quota, row)
    assert torch.equal(mask, same)
    assert torch.allclose(whole, parts, atol=1e-4)
