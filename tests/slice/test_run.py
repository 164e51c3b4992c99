import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from slimlm.checkpoint.skeleton import build_skeleton, parameter_count
from slimlm.errors import UserError
from slimlm.linalg.budget import LossCurve
from slimlm.linalg.pca import leading, without_mean
from slimlm.model.rotation import slice_embedding, write_tied_norm
from slimlm.model.stream import put
from slimlm.recipe import SliceStep, one_step
from slimlm.run import Plan
from slimlm.slice import run as slicing
from slimlm.slice.basis import Basis
from slimlm.slice.candidates import candidates, uneven_line
from slimlm.slice.config import plan_widths
from slimlm.slice.curves import choose
from slimlm.slice.plan import plan_slice
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout, Widths
from slimlm.stages import compress
from tests.conftest import CONFIGS, SIZES, build_tiny, logits_of, random_tokens, stream
from tests.families.configs import family_config
from tests.helpers import carried_out, run_at

PLAIN = {"model": "x", "refit": False, "weighting": "none"}
HOW = {name: PLAIN[name] for name in ("refit", "weighting")}


def widths(model, hidden: int) -> Widths:
    return replace(Layout(model).dense, hidden=hidden)


def plan_width(model, hidden: int) -> Plan:
    return plan_widths(Shapes(Layout(model, turns=True)), widths(model, hidden), "auto")


def written(model, basis, path: Path) -> Path:
    """Rewrite the model in `basis` to a checkpoint at `path`."""
    plan, width = plan_width(model, basis.shape[1]), basis.shape[1]
    run = run_at(model, [], path, widths=f"hidden={width}")
    run.result.lay_out(plan.tensors, plan.carrier)
    slicing._rotate(run, Layout(model, turns=True), widths(model, width), basis)
    run.result.settle()
    run.result.writer.finish()
    plan.config.save_pretrained(path / "model")
    return path / "model"


def orthogonal(rows: int, columns: int) -> torch.Tensor:
    basis, _ = torch.linalg.qr(torch.randn(rows, rows, generator=torch.Generator().manual_seed(5)).double())
    return basis[:, :columns]


def test_a_rotation_at_full_width_keeps_the_logits(tiny: Path, tmp_path: Path):
    model, tokens = stream(tiny), random_tokens()
    rotated = written(model, orthogonal(32, 32), tmp_path / "rotated")
    before, after = logits_of(tiny, tokens), logits_of(rotated, tokens)
    assert (before - after).abs().max() < 1e-4
    assert before.abs().max() > 1


def confined(path: Path, width: int) -> torch.Tensor:
    """Rewrite a checkpoint so that its stream lives in the `width` directions returned: [hidden, width]."""
    directions = orthogonal(32, width)
    tensors = load_file(path / "model.safetensors")
    project = (directions @ directions.T).float()
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensors[name] = tensor @ project
        elif "o_proj" in name or "down_proj" in name:
            tensors[name] = project @ tensor
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"}
    )
    return directions


def test_slicing_is_exact_where_the_stream_lives_in_fewer_directions(tiny: Path, tmp_path: Path):
    directions = confined(tiny, 20)
    model, tokens = stream(tiny), random_tokens(8, 32)
    outcome = carried_out(run_at(model, [tokens], tmp_path / "run", **HOW, widths="hidden=20"))
    basis = outcome.basis
    assert outcome.notes["calibration_tokens_per_norm"] == tokens.numel()
    assert torch.allclose(basis @ basis.T, (directions @ directions.T).float(), atol=1e-5)
    sliced = written(model, basis, tmp_path / "sliced")
    assert (logits_of(tiny, tokens) - logits_of(sliced, tokens)).abs().max() < 1e-4


def test_the_gram_is_the_sum_over_every_norms_normalised_input(tiny_llama: Path, tmp_path: Path):
    tokens, streamed = random_tokens(4, 16), stream(tiny_llama)
    run = run_at(streamed, list(tokens.split(3)), tmp_path / "run", widths="hidden=20")
    gram = slicing._statistics(run, "calibration").gram
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    expected = torch.zeros(32, 32, dtype=torch.float64)

    def observe(module, args):
        x = args[0].double().reshape(-1, 32)
        x = x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        expected.add_(x.T @ x)

    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    for norm in norms:
        norm.register_forward_pre_hook(observe)
    with torch.no_grad():
        model(tokens)
    assert len(norms) == 2 * 3 + 1
    assert torch.allclose(gram.matrix, expected, rtol=1e-5, atol=1e-4)
    assert gram.tokens == 64 * 7


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("width", [8, 12])
def test_the_sparsity_is_the_share_of_all_parameters_gone(tmp_path: Path, name: str, width: int):
    path = build_tiny(CONFIGS[name], tmp_path / name)
    model = stream(path)
    dense = parameter_count(model.model)
    sparsity = 1 - plan_width(model, width).parameters / dense
    plan = plan_slice(model, SliceStep(**PLAIN, sparsity=sparsity + 0.003))
    assert plan.config.hidden_size == width
    assert 1 - plan.parameters / dense == pytest.approx(sparsity)
    sliced = written(model, orthogonal(32, plan.config.hidden_size), tmp_path / "out")
    loaded, report = AutoModelForCausalLM.from_pretrained(sliced, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    assert sum(parameter.numel() for parameter in loaded.parameters()) == plan.parameters
    assert loaded.config.head_dim == 8


def test_a_tied_head_stays_tied_when_the_final_gain_is_constant(tmp_path: Path):
    path = build_tiny(CONFIGS["llama-tied"], tmp_path / "tied")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"].fill_(0.7)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    confined(path, 20)
    model, tokens = stream(path), random_tokens(8, 32)
    run = run_at(model, [tokens], tmp_path / "run", **HOW, sparsity=0.375)
    plan = run.plan
    assert plan.config.tie_word_embeddings
    assert "lm_head.weight" not in plan.tensors
    basis = carried_out(run).basis
    sliced = written(model, basis, tmp_path / "sliced")
    assert plan.config.hidden_size == 20
    assert (logits_of(path, tokens) - logits_of(sliced, tokens)).abs().max() < 1e-4


def test_untying_is_counted_against_the_tied_original_and_never_gives_a_larger_model(tmp_path: Path):
    path = build_tiny(CONFIGS["llama-tied"], tmp_path / "tied")
    model = stream(path)
    dense = parameter_count(model.model)
    plan = plan_slice(model, SliceStep(**PLAIN, sparsity=0.3))
    assert plan.changes["tie_word_embeddings"] == (True, False)
    assert plan.parameters < dense
    assert plan.config.hidden_size < 16  # two vocabularies where there was one


@pytest.mark.parametrize(("sparsity", "message"), [(0.001, "cannot be reached"), (0.008, "the nearest is 0.0")])
def test_a_sparsity_that_rounding_cannot_reach_names_the_nearest(tiny_llama: Path, sparsity: float, message: str):
    with pytest.raises(UserError, match=message):
        plan_slice(stream(tiny_llama), SliceStep(**PLAIN, sparsity=sparsity))


def small_tied(path: Path) -> Path:
    config = copy.deepcopy(CONFIGS["mistral-tied"])
    config.hidden_size, config.head_dim, config.vocab_size = 128, 32, 512
    return build_tiny(config, path)


@pytest.mark.parametrize("sparsity", [0.008, 0.02])
def test_a_small_request_never_gives_a_larger_model(tmp_path: Path, sparsity: float):
    """A second vocabulary, which untying the head brings, is more than so few parameters."""
    model = stream(small_tied(tmp_path / "tied"))
    plan = plan_slice(model, SliceStep(**PLAIN, sparsity=sparsity))
    assert 1 - plan.parameters / parameter_count(model.model) == pytest.approx(sparsity, rel=0.5)


@pytest.mark.parametrize("sparsity", [0.001, 0.004])
def test_a_request_too_small_for_any_narrower_model_is_refused(tmp_path: Path, sparsity: float):
    with pytest.raises(UserError, match="cannot be reached: the nearest is 0.00"):
        plan_slice(stream(small_tied(tmp_path / "tied")), SliceStep(**PLAIN, sparsity=sparsity))


def test_a_requested_rounding_is_kept(tiny_llama: Path):
    with pytest.raises(UserError, match="no smaller width is left"):
        plan_slice(stream(tiny_llama), SliceStep(**PLAIN, sparsity=0.25, round_to=32))


def test_a_weight_nobody_declared_stops_with_its_name(tiny_llama: Path):
    model = stream(tiny_llama)
    model.blocks[1].module.register_parameter("surprise", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(UserError, match=r"model\.layers\.1\.surprise"):
        plan_width(model, 16)


def test_padding_and_batching_do_not_change_a_sliced_model(tiny_llama: Path, tmp_path: Path):
    model = stream(tiny_llama)
    sliced = written(model, orthogonal(32, 24), tmp_path / "sliced")
    loaded, tokens = AutoModelForCausalLM.from_pretrained(sliced).eval(), random_tokens(1, 10)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 10, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        alone = loaded(tokens).logits
        together = loaded(padded, attention_mask=mask, position_ids=positions).logits[:, 6:]
        cached = loaded.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=True)
        uncached = loaded.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.allclose(alone, together, atol=1e-4)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("weighting", ["loss", "none"])
def test_a_slice_of_a_rotated_checkpoint_is_the_direct_slice_and_needs_no_data(
    tiny: Path, tmp_path: Path, weighting: str
):
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane, and nobody had lived there. " * 40)
    common = {"weighting": weighting, "dtype": "float32", "measure": False, "max_seq_length": 32}
    data = {"dataset": str(tmp_path / "text.txt"), "num_calibration_samples": 6}
    made = {
        "direct": one_step(model=str(tiny), widths="hidden=12", refit=False, **common, **data),
        "rotated": one_step(model=str(tiny), method="rotate", **common, **data),
        "nested": one_step(model=str(tmp_path / "rotated"), widths="hidden=12", refit=False, **common),
    }
    for name, recipe in made.items():
        compress(recipe.updated(output_dir=str(tmp_path / name)))
    tokens = random_tokens()
    assert (logits_of(tiny, tokens) - logits_of(tmp_path / "rotated", tokens)).abs().max() < 1e-4
    direct, nested = (load_file(tmp_path / name / "model.safetensors") for name in ("direct", "nested"))
    assert direct.keys() == nested.keys()
    for name, tensor in direct.items():
        assert torch.allclose(tensor, nested[name], atol=1e-5), name
    with pytest.raises(UserError, match="no calibration data"):
        compress(
            one_step(model=str(tmp_path / "rotated"), widths="hidden=12", **common, output_dir=str(tmp_path / "x"))
        )
    with pytest.raises(UserError, match="no calibration data"):  # to choose by
        compress(made["nested"].updated(widths="hidden=12/hidden=16"))


def test_rotating_deletes_nothing():
    with pytest.raises(UserError, match="rotate does not read sparsity"):
        one_step(model="x", method="rotate", sparsity=0.5)


@pytest.mark.parametrize("name", ["qwen3 tied", "gemma tied", "opt tied", "falcon"])
def test_a_tied_head_is_exact_with_the_final_gain_in_the_embedding(tmp_path: Path, name: str):
    """For any state of the stream that lies in the basis, and a bias of the norm, too."""
    config = family_config(name.replace("gemma tied", "gemma"))
    config.tie_word_embeddings = True
    path = build_tiny(config, tmp_path / "model")
    model, width = stream(path), 24
    family, x = model.family, torch.randn(5, 32, generator=torch.Generator().manual_seed(3)).double()
    vectors = without_mean(32) if family.centred else torch.eye(32, dtype=torch.float64)
    basis = leading(vectors, 31 if family.centred else width, family.centred)
    x = x @ basis @ basis.T
    layout = Layout(model)
    plan = plan_widths(Shapes(layout), replace(layout.dense, hidden=basis.shape[1], tied=True), "auto")
    assert plan.config.tie_word_embeddings
    assert plan.parameters < parameter_count(model.model)
    table = family.embeddings[0]
    written = dict(slice_embedding(model, table, basis, tied=True)) | dict(write_tied_norm(model, basis))
    rows = torch.cat(list(written.pop(f"{table}.weight")))
    dense = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        expected = dense.lm_head(dense.get_submodule(family.final_norm)(x.float()))
        norm = build_skeleton(plan.config).get_submodule(family.final_norm)
        for key, tensor in written.items():
            put(norm, key.rpartition(".")[2], tensor.float().contiguous())
        got = norm((x @ basis).float()) @ rows.float().T
    assert (got - expected).abs().max() < 1e-4


def test_tensors_that_the_architecture_does_not_use_change_nothing(tiny_llama: Path, tmp_path: Path):
    def sliced(name: str) -> dict[str, torch.Tensor]:
        carried_out(run_at(stream(tiny_llama), [random_tokens(8, 32)], tmp_path / name, **HOW, widths="hidden=20"))
        return load_file(tmp_path / name / "model" / "model.safetensors")

    before = sliced("before")
    tensors = load_file(tiny_llama / "model.safetensors")
    extra = {
        "lm_head.bias": torch.ones(4096),
        "model.norm.bias": torch.ones(32),
        "model.layers.0.mlp.up_proj.bias": torch.ones(48),
    }
    save_file(tensors | extra, tiny_llama / "model.safetensors", {"format": "pt"})
    after = sliced("after")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def layout_of(path: Path, **changes: object) -> Layout:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**{**SIZES, **sizes, "head_dim": 32, **changes})
    return Layout(stream(build_tiny(config, path / "model")))


@pytest.mark.parametrize("sparsity", [0.2, 0.25, 0.4])
def test_widths_are_such_as_quantised_formats_take(tmp_path: Path, sparsity: float):
    layout = layout_of(tmp_path)
    splits = candidates(Shapes(layout), SliceStep(model="x", sparsity=sparsity))
    assert len(splits) > 4
    assert all(not layout.uneven(split) for split in splits)
    assert all(width % 32 == 0 for split in splits for width in (split.hidden, split.mlp, 32 * 2 * split.groups))
    assert uneven_line(layout, splits) is None


def test_less_than_32_comes_with_what_it_costs(tiny_llama: Path):
    plan = plan_slice(stream(tiny_llama), SliceStep(model="x", sparsity=0.25))
    assert "no multiple of 32" in str(plan.remark)
    plan = plan_slice(stream(tiny_llama), SliceStep(model="x", widths="hidden=20"))
    assert "hidden 20" in str(plan.remark)
    assert plan_slice(stream(tiny_llama), SliceStep(model="x", widths="mlp=32")).remark is None


@pytest.mark.parametrize(("coarse", "chosen"), [(1.04, 64), (1.06, 32)])
def test_a_split_that_all_formats_take_may_cost_five_hundredths_more(tmp_path: Path, coarse: float, chosen: int):
    layout = layout_of(tmp_path)
    fine, wide = replace(layout.dense, mlp=1024 - 96), replace(layout.dense, mlp=1024 - 128)
    curves = {axis: LossCurve([]) for axis in ("hidden", "groups", "blocks", "tied")}
    curves["mlp"] = LossCurve([(96, 1.0), (128, coarse)])
    found = Basis(torch.eye(256, dtype=torch.float64), torch.ones(3, dtype=torch.float64), {}, False)
    best, notes = choose(layout, [fine, wide], found, curves)
    assert best.mlp % 64 == chosen % 64
    assert notes["predicted_loss"] == pytest.approx(coarse if chosen == 64 else 1.0)


def test_256_is_asked_for_of_wide_rows_alone(tmp_path: Path):
    layout = layout_of(tmp_path, intermediate_size=4096, num_hidden_layers=1)
    assert layout.suits_all(replace(layout.dense, mlp=2304))
    assert not layout.suits_all(replace(layout.dense, mlp=2112))
    assert layout.suits_all(replace(layout.dense, mlp=1984))


@pytest.mark.parametrize(
    ("widths", "model_type"),
    [("hidden=224", "mistral"), ("mlp=512", "llama"), ("hidden=128,groups=2", "llama"), ("groups=2", "mistral")],
)
def test_a_llama_whose_heads_no_longer_fit_its_stream_is_a_mistral(tmp_path: Path, widths: str, model_type: str):
    layout = layout_of(tmp_path)
    plan = plan_slice(layout.model, SliceStep(model="x", widths=widths))
    assert plan.config.model_type == model_type
    assert plan.config.head_dim == 32
    assert getattr(plan.config, "sliding_window", None) is None


def test_a_llama_with_biases_stays_one(tmp_path: Path):
    layout = layout_of(tmp_path, attention_bias=True)
    plan = plan_slice(layout.model, SliceStep(model="x", widths="hidden=224"))
    assert plan.config.model_type == "llama"
    with pytest.raises(UserError, match="a multiple of 8"):
        plan_slice(layout.model, SliceStep(model="x", widths="hidden=228"))
