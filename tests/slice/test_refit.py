import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimlm.calibration import sample
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.errors import UserError
from slimlm.recipe import SliceStep
from slimlm.slice import run as slicing
from slimlm.slice.candidates import candidates
from slimlm.slice.config import plan_widths
from slimlm.slice.plan import plan_slice
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout
from tests.conftest import CONFIGS, build_tiny, logits_of, random_tokens, stream
from tests.helpers import carried_out, run_at


def sliced(model, tokens: torch.Tensor, path: Path, **settings) -> tuple[Path, dict]:
    run = run_at(model, list(tokens.split(4)), path, dtype="float32", **settings)
    return path / "model", carried_out(run).notes


def divergence(dense: Path, small: Path, tokens: torch.Tensor) -> float:
    wanted, got = (logits_of(path, tokens).log_softmax(-1) for path in (dense, small))
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@pytest.mark.parametrize("widths", ["hidden=24", "hidden=32,mlp=32", "groups=1", "hidden=24,mlp=40,groups=1,blocks=2"])
def test_every_width_gives_a_stock_checkpoint_that_computes_what_its_config_says(
    tiny: Path, tmp_path: Path, widths: str
):
    model, tokens = stream(tiny), random_tokens(12, 24)
    path, notes = sliced(model, tokens, tmp_path / "run", widths=widths)
    loaded, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    sizes = dict(pair.split("=") for pair in notes["widths"].split(","))
    assert loaded.config.hidden_size == int(sizes["hidden"])
    assert loaded.config.intermediate_size == int(sizes["mlp"])
    assert loaded.config.num_key_value_heads == int(sizes["groups"])
    assert loaded.config.num_attention_heads == 2 * int(sizes["groups"])
    assert loaded.config.num_hidden_layers == int(sizes["blocks"])
    with torch.no_grad():
        cached = loaded.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False, use_cache=True)
        uncached = loaded.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)
    assert divergence(tiny, path, tokens) < divergence_of_guessing(tiny, tokens)


def divergence_of_guessing(dense: Path, tokens: torch.Tensor) -> float:
    wanted = logits_of(dense, tokens).log_softmax(-1)
    guess = wanted.exp().mean((0, 1)).log()
    return float((wanted.exp() * (wanted - guess)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "llama-biased", "mistral-sliding"])
def test_the_refit_comes_nearer_to_the_dense_model_than_rotation_alone(tmp_path: Path, name: str):
    path = build_tiny(CONFIGS[name], tmp_path / name)
    model, tokens, unseen = stream(path), random_tokens(60, 32), random_tokens(12, 32, seed=7)
    plain, _ = sliced(model, tokens, tmp_path / "plain", widths="hidden=24", refit=False)
    refitted, _ = sliced(model, tokens, tmp_path / "refitted", widths="hidden=24")
    assert divergence(path, refitted, unseen) < 0.9 * divergence(path, plain, unseen)


def test_units_that_do_nothing_go_first_and_their_going_is_exact(tiny_llama: Path, tmp_path: Path):
    tensors = load_file(tiny_llama / "model.safetensors")
    dead = {0: [3, 17, 18, 20, 31, 40, 46, 47], 1: list(range(8)), 2: list(range(8, 16))}
    for block, neurons in dead.items():
        tensors[f"model.layers.{block}.mlp.down_proj.weight"][:, neurons] = 0
        tensors[f"model.layers.{block}.self_attn.o_proj.weight"][:, 16 * (block % 2) : 16 * (block % 2) + 16] = 0
    save_file(tensors, tiny_llama / "model.safetensors", {"format": "pt"})
    model, tokens = stream(tiny_llama), random_tokens(20, 24)
    path, _ = sliced(model, tokens, tmp_path / "run", widths="mlp=40,groups=1")
    assert (logits_of(tiny_llama, tokens) - logits_of(path, tokens)).abs().max() < 1e-3


def test_a_block_that_does_nothing_is_the_one_that_goes(tiny_llama: Path, tmp_path: Path):
    tensors = load_file(tiny_llama / "model.safetensors")
    for writer in ("mlp.down_proj", "self_attn.o_proj"):
        tensors[f"model.layers.1.{writer}.weight"].zero_()
    save_file(tensors, tiny_llama / "model.safetensors", {"format": "pt"})
    tokens = random_tokens(20, 24)
    path, _ = sliced(stream(tiny_llama), tokens, tmp_path / "run", widths="blocks=2")
    assert (logits_of(tiny_llama, tokens) - logits_of(path, tokens)).abs().max() < 1e-3


def large_blocks(name: str, path: Path) -> Path:
    """A tiny model most of whose parameters are in its blocks."""
    config = copy.deepcopy(CONFIGS[name])
    config.vocab_size, config.intermediate_size = 64, 256
    return build_tiny(config, path)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_candidates_have_the_size_asked_for_and_widths_that_fit_the_config(tmp_path: Path, name: str):
    model = stream(large_blocks(name, tmp_path / name))
    shapes, dense = Shapes(Layout(model)), parameter_count(model.model)
    found = candidates(shapes, SliceStep(model="x", sparsity=0.4, round_to=8))
    assert len({split.hidden for split in found}) > 1
    assert len({split.groups for split in found}) == 2
    for split in found:
        plan = plan_widths(shapes, split, "auto")  # builds the stock class, which checks its config
        assert 1 - plan.parameters / dense == pytest.approx(0.4, abs=0.01)
        assert shapes.parameters(split) == plan.parameters
    narrower = replace(shapes.dense, hidden=16)
    share = 1 - shapes.parameters(narrower) / dense
    assert candidates(shapes, SliceStep(model="x", sparsity=share + 0.002, budget="hidden")) == [narrower]


def test_a_curve_is_the_loss_of_the_model_that_is_cut_so_far(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Against the checkpoint that has the width: rotation alone does to the model what the curve says."""
    tokens = random_tokens(60, 24)
    model, settings = stream(tiny_llama), {"widths": "hidden=24", "refit": False}
    run, layout = run_at(model, list(tokens.split(4)), tmp_path / "basis", **settings), Layout(model)
    monkeypatch.setattr("slimlm.device.product_dtype", lambda device, dtype: dtype)
    basis = slicing._new_basis(run)
    splits = [replace(layout.dense, hidden=24), replace(layout.dense, blocks=(0, 1))]
    curves = slicing._curves(run, layout, splits, basis)
    with monkeypatch.context() as patch:
        patch.setattr("slimlm.device.product_dtype", lambda *_: torch.bfloat16)
        rounded = slicing._curves(run, layout, splits, basis)
    for axis, removed in (("hidden", 8), ("blocks", 1)):
        assert 0 < abs(rounded[axis](removed) - curves[axis](removed)) < 0.05 * curves[axis](removed)
    held = tokens[4::5]
    path, _ = sliced(model, tokens, tmp_path / "run", **settings)
    loss = lambda path: nll(logits_of(path, held), held)  # noqa: E731
    ((removed, rise),) = curves["hidden"].points
    assert (removed, rise) == (8, pytest.approx(loss(path) - loss(tiny_llama), abs=1e-5))
    assert curves["blocks"](1) > 0
    assert [curves[axis].points for axis in ("mlp", "groups")] == [[], []]


def nll(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def test_the_split_is_the_one_that_measures_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model whose stream lives in half its directions: cutting hidden_size costs nothing, neurons something."""
    path = large_blocks("llama", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensor[:, 16:] = 0
        elif "o_proj" in name or "down_proj" in name:
            tensor[16:] = 0
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    whole = AutoModelForCausalLM.from_pretrained(path).eval()
    monkeypatch.setattr(
        sample,
        "draw",
        lambda logits, heat, generator: torch.multinomial((logits.float() / heat).softmax(-1), 1, generator=generator),
    )
    begun, heat = torch.zeros(20, 1, dtype=torch.int64), torch.ones(20, 1)  # text of the model's own distribution
    batches = list(sample.go_on(whole, begun, heat, 24, torch.Generator().manual_seed(0)).split(4))
    model = stream(path)
    run, shapes = run_at(model, batches, tmp_path / "run", sparsity=0.4), Shapes(Layout(model))
    basis, splits = slicing._new_basis(run), candidates(shapes, run.recipe)
    chosen, notes = slicing._settle(run, shapes.layout, splits, basis)
    assert abs(notes["curves"]["hidden"][0][1]) < 1e-4
    assert (chosen.hidden, chosen.groups, len(chosen.blocks)) == (24, 2, 3)
    assert notes["predicted_loss"] < 0.01  # of the neurons beside it, as far as the error of so few windows tells
    assert notes["splits"] == len(splits)


def test_what_the_refit_wins_back_is_not_held_against_a_width(tmp_path: Path):
    """Three quarters of what cutting hidden_size costs stays, all of what cutting the others does."""
    model = stream(large_blocks("llama", tmp_path / "model"))
    batches = list((random_tokens(20, 24) % 64).split(4))
    runs = {refit: run_at(model, batches, tmp_path / str(refit), sparsity=0.4, refit=refit) for refit in (False, True)}
    shapes, basis = Shapes(Layout(model)), slicing._new_basis(runs[True])
    splits = candidates(shapes, runs[True].recipe)
    found = {refit: slicing._settle(run, shapes.layout, splits, basis)[1]["curves"] for refit, run in runs.items()}
    for axis, left in (("hidden", 0.75), ("mlp", 1.0), ("groups", 1.0)):
        assert len(found[True][axis]) > 0
        for (units, measured), (same, counted) in zip(found[False][axis], found[True][axis], strict=True):
            assert (units, left * measured) == (same, pytest.approx(counted))


def test_no_candidate_is_wider_than_the_model(tmp_path: Path):
    config = copy.deepcopy(CONFIGS["mistral"])
    config.vocab_size, config.intermediate_size = 64, 70  # no multiple of 8
    shapes = Shapes(Layout(stream(build_tiny(config, tmp_path / "model"))))
    for sparsity in (0.1, 0.2, 0.3):
        assert all(split.mlp <= 70 for split in candidates(shapes, SliceStep(model="x", sparsity=sparsity)))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_that_are_held_out_as_a_whole_do_no_harm(tiny_llama: Path, tmp_path: Path, batch_size: int):
    model, tokens = stream(tiny_llama), random_tokens(10, 24)
    notes = carried_out(run_at(model, list(tokens.split(batch_size)), tmp_path / "run", widths="hidden=24")).notes
    assert 0 < notes["refit"]["head"]["kl"] < divergence_of_guessing(tiny_llama, tokens)


def test_computing_in_bf16_as_on_a_gpu_costs_little(tmp_path: Path):
    tokens, losses = random_tokens(20, 32), {}
    path = build_tiny(CONFIGS["llama"], tmp_path / "model", torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        _, notes = sliced(stream(path, dtype), tokens, tmp_path / str(dtype), widths="hidden=24", weighting="none")
        losses[dtype] = notes["refit"]["head"]["kl"]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.1)


def test_of_several_widths_given_the_one_that_costs_least_is_taken(tiny_llama: Path, tmp_path: Path):
    model, tokens = stream(tiny_llama), random_tokens(12, 24)
    plan = plan_slice(model, SliceStep(model="x", widths="hidden=24,blocks=2/hidden=28,blocks=1"))
    assert plan.widths == "hidden=24,mlp=48,groups=2/hidden=28,mlp=48,groups=2"
    _, notes = sliced(model, tokens, tmp_path / "run", widths="hidden=8/hidden=24,mlp=40/mlp=8,groups=1")
    (second, loss), (third, more) = (line.split(": ") for line in notes["next"])
    assert {notes["widths"], second, third} == {
        "hidden=8,mlp=48,groups=2,blocks=3", "hidden=24,mlp=40,groups=2,blocks=3", "hidden=32,mlp=8,groups=1,blocks=3"
    }  # fmt: skip
    assert notes["predicted_loss"] - 1e-4 < float(loss) <= float(more)


def test_widths_that_cannot_be_had_are_refused(tiny_llama: Path, tmp_path: Path):
    model = stream(tiny_llama)
    biased = stream(build_tiny(CONFIGS["llama-biased"], tmp_path / "biased"))  # which only the class it has can carry
    with pytest.raises(UserError, match="wants a multiple of 4"):
        plan_slice(biased, SliceStep(model="x", widths="hidden=30"))
    for widths, message in {
        "hidden=40": "the model has 32",
        "mlp=49": "the model has 48",
        "groups=3": "the model has 2",
        "blocks=4": "the model has 3",
    }.items():
        with pytest.raises(UserError, match=message):
            plan_slice(model, SliceStep(model="x", widths=widths))
    with pytest.raises(UserError, match="--widths mlp and groups need the refit"):
        plan_slice(model, SliceStep(model="x", widths="mlp=40", refit=False))
