"""Laws that hold for every family, on tiny real models of each."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from slimlm.checkpoint.companions import copy_companions
from slimlm.errors import UserError
from slimlm.families import FAMILIES, family_of
from slimlm.linalg.pca import without_mean
from slimlm.model.linears import canonical, matrix
from slimlm.recipe import AnyStep, RotateStep, SliceStep, one_step
from slimlm.report.models import models_table
from slimlm.slice.candidates import candidates
from slimlm.slice.config import config_of
from slimlm.slice.plan import plan_rotate, plan_slice
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout
from slimlm.stages import compress
from tests.conftest import build_tiny, in_steps, logits_of, random_tokens, stream
from tests.families.configs import SETTINGS, family_config
from tests.helpers import carried_out, run_at
from tests.model.test_walk import walked_logits
from tests.prune.test_run import die_after_record

FOLDER = "families"
ROTATING = [name for name in SETTINGS if family_of(family_config(name)).rotates]
KINDS = [  # one for each way that a block can be fitted
    *("qwen2 sliding", "smollm3", "granite", "gemma3_text", "olmo2", "stablelm parallel", "phi", "gpt_neox", "gpt2"),
    *("opt", "opt post-norm", "falcon", "bloom", "mixtral", "qwen2_moe", "qwen3_moe"),
]
WIDTH = 24


@pytest.fixture(scope="session")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of every kind, and tokens."""
    folder = tmp_path_factory.mktemp(FOLDER)
    for name in SETTINGS:
        build_tiny(family_config(name), folder / name)
    numpy.save(folder / "tokens.npy", random_tokens(20, 32).numpy())
    return folder


def run(model, recipe: AnyStep, batches: list[torch.Tensor], out: Path, source: Path) -> Path:
    """A method's result as a checkpoint."""
    settings = {**recipe.model_dump(exclude_unset=True, exclude={"model"}), "method": recipe.method}
    outcome = carried_out(run_at(model, batches, out, **settings))
    for file in outcome.plan.files:
        (out / "model" / file.name).write_bytes(file.read_bytes())
    copy_companions(source, out / "model")
    return out / "model"


def test_every_family_is_tested():
    made_by_slimlm = {name for name in FAMILIES if name.startswith(("narrow_", "sliced_"))}
    tested = {family_config(name).model_type for name in SETTINGS} | {"llama", "mistral"}
    assert FAMILIES.keys() == tested | made_by_slimlm


@pytest.mark.parametrize("name", SETTINGS)
def test_a_walk_that_changes_nothing_gives_the_models_own_logits_exactly(tinies: Path, name: str):
    """At lengths beyond the sliding window, too."""
    batches = list(random_tokens(3, 24).split(2))
    for dtype in (torch.float32, torch.bfloat16):
        model = stream(tinies / name, dtype)
        for got, tokens in zip(walked_logits(model, batches), batches, strict=True):
            assert torch.equal(got, logits_of(tinies / name, tokens, dtype))


@pytest.mark.parametrize("name", SETTINGS)
def test_all_that_is_declared_is_there_and_all_that_is_there_is_declared(tinies: Path, name: str):
    model = stream(tinies / name)
    assert all(model.family.role(parameter) for parameter in model.model.state_dict())
    declared = {linear for block in model.blocks for linear in (*block.family.readers, *block.family.writers)}
    assert declared == {*model.family.readers, *model.family.writers} or model.family.experts
    block = model.blocks[0]
    in_blocks = sum(p.numel() for p in block.module.parameters() if p.dim() > 1)
    routers = sum(block.matrix(router).numel() for router in model.family.unpruned)
    pruned = sum(block.matrix(linear).numel() for linear in block.family.linears)
    assert pruned + routers == in_blocks


@pytest.mark.parametrize("name", SETTINGS)
def test_no_two_parameters_gradients_are_one_tensor(tinies: Path, name: str):
    """`deal.Sum` takes the first as they are and adds to them in place."""
    model = AutoModelForCausalLM.from_pretrained(tinies / name, dtype=torch.float32).eval()
    loss = model(random_tokens(2, 24)).logits.float().logsumexp(-1).sum()
    found = [one for one in torch.autograd.grad(loss, [*model.parameters()], allow_unused=True) if one is not None]
    assert len(found) > 10
    assert len({one.untyped_storage().data_ptr() for one in found}) == len(found)
    assert all(one.is_contiguous() or one.T.is_contiguous() for one in found)


PLANNED = [name for name in SETTINGS if getattr(family_config(name), "base_model_tp_plan", None)]


@pytest.mark.parametrize("name", PLANNED)
def test_readers_writers_and_embeddings_are_those_of_transformers_plan_for_tensor_parallelism(name: str):
    config = family_config(name)
    family = family_of(config)
    for path, how in config.base_model_tp_plan.items():
        linear = path.removeprefix("layers.*.")
        if family.experts and linear.startswith("mlp."):  # a list for layers with and without experts
            continue
        if how == "embedding_rowwise":
            assert any(embedding.endswith(f".{path}") for embedding in family.embeddings), path
            continue
        expected = {"colwise": family.readers, "rowwise": family.writers}.get(how.partition("_")[0], family.inner)
        assert linear in expected, (path, how)


@pytest.mark.parametrize("name", ROTATING)
def test_a_rotation_keeps_the_logits(tinies: Path, tmp_path: Path, name: str):
    tokens, recipe = random_tokens(3, 24), RotateStep(model="x", weighting="none")
    path = run(stream(tinies / name), recipe, [tokens], tmp_path, tinies / name)
    assert (logits_of(path, tokens) - logits_of(tinies / name, tokens)).abs().max() < 1e-4


def confined(source: Path, path: Path) -> Path:
    """A copy of a model whose residual stream lives in as many directions as a sliced one of WIDTH has."""
    model = AutoModelForCausalLM.from_pretrained(source)
    family = stream(source).family
    directions, _ = torch.linalg.qr(torch.randn(31, 31, generator=torch.Generator().manual_seed(5)).double())
    if family.centred:  # one direction of the sliced stream is its mean
        directions = without_mean(32)[:, :31] @ directions[:, : WIDTH - 1]
    else:
        directions = torch.nn.functional.pad(directions[:, :WIDTH], (0, 0, 0, 1))
    project = (directions @ directions.T).float()
    with torch.no_grad():
        for name in family.embeddings:
            weight = model.get_submodule(name).weight
            weight.copy_(weight @ project)
        if family.embedding_norm:  # an even gain keeps the directions
            norm = model.get_submodule(family.embedding_norm)
            norm.weight.fill_(0.7)
            norm.bias.copy_(project @ norm.bias)
        for block, known in zip(model.get_submodule(family.blocks), stream(source).blocks, strict=True):
            for name in set(known.family.writing) & {name for name, _ in block.named_parameters()}:
                canonical(block, name).copy_(project @ canonical(block, name))
    model.save_pretrained(path)
    copy_companions(source, path)
    return path


@pytest.fixture(scope="session")
def sliced(tinies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model that rotates, confined to fewer directions and sliced to them, by name; and its logits before."""
    folder = tmp_path_factory.mktemp("sliced")
    tokens = random_tokens(12, 24)
    recipe = SliceStep(model="x", widths=f"hidden={WIDTH}", refit=False, weighting="none")
    for name in ROTATING:
        path = confined(tinies / name, folder / name / "dense")
        run(stream(path), recipe, [tokens], folder / name, path)
        save_file({"logits": logits_of(path, tokens[:2]), "tokens": tokens[:2]}, folder / name / "before.safetensors")
    return folder


@pytest.mark.parametrize("name", ROTATING)
def test_slicing_is_exact_where_the_stream_lives_in_fewer_directions(sliced: Path, name: str):
    before = load_file(sliced / name / "before.safetensors")
    path = sliced / name / "model"
    assert AutoModelForCausalLM.from_pretrained(path).config.hidden_size == WIDTH
    assert (logits_of(path, before["tokens"]) - before["logits"]).abs().max() < 1e-4


CARRIERS = {name: carrier for name in ROTATING if (carrier := family_of(family_config(name)).carrier)}
OWN = [name for name, carrier in CARRIERS.items() if not carrier.stock]
ONE_EACH = list(
    {CARRIERS[name].model_type: name for name in reversed(OWN)}.values()
)  # one of each class of slimlm's own


@pytest.mark.parametrize("name", OWN)
def test_a_class_of_slimlms_own_is_a_family_like_any_other(sliced: Path, tmp_path: Path, name: str):
    path, tokens = sliced / name / "model", random_tokens(3, 24)
    before = logits_of(path, tokens)
    assert torch.equal(next(iter(walked_logits(stream(path), [tokens]))), before)
    recipe = RotateStep(model="x", weighting="none")
    again = run(stream(path), recipe, [tokens], tmp_path, path)
    assert (logits_of(again, tokens) - before).abs().max() < 1e-4


FRESH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

for folder in map(Path, sys.argv[1:]):
    own_code = any((folder / "model").glob("modeling_*.py"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=own_code).eval()
    assert not own_code or "transformers_modules" in type(model).__module__, type(model)
    before = load_file(folder / "before.safetensors")
    tokens, logits = before["tokens"], before["logits"]
    with torch.no_grad():
        assert (model(tokens).logits - logits).abs().max() < 1e-4, folder.name
        one = model(tokens[:1]).logits
        assert (one - logits[:1]).abs().max() < 1e-4, f"{folder.name}: the batch matters"
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens[:1]], 1)
        mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(tokens[:1])], 1)
        if model.config.model_type not in ("narrow_gpt2",):  # GPT-2 takes positions from generate, not from the mask
            after = model(padded, attention_mask=mask).logits[:, 3:]
            assert (after - logits[:1]).abs().max() < 1e-3, f"{folder.name}: padding matters"
        with_cache, without = (
            model.generate(tokens[:1, :12], max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
            for cached in (True, False)
        )
        assert torch.equal(with_cache, without), folder.name
assert "slimlm" not in sys.modules
"""


def check_in_a_fresh_process(folders: list[Path], home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, folders)], capture_output=True, text=True, cwd=home, check=False,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HOME": str(home), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="session")
def by_hand(tinies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that were narrowed and then pruned, or keep what few have; and their logits before, by name."""
    folder = tmp_path_factory.mktemp("by_hand")
    then = {"method": "sparsegpt", "sparsity": 0.5}
    for name, later, widths in (("opt", [then], "hidden=24"), ("bloom", [], "mlp=40")):
        path, tokens = folder / name / "model", random_tokens(2, 24)
        assert pruned(tinies, name, path, *later, widths=widths)["needs_remote_code"]
        save_file({"logits": logits_of(path, tokens), "tokens": tokens}, folder / name / "before.safetensors")
    return folder


REST = [name for name in ROTATING if name not in ONE_EACH]


@pytest.mark.parametrize("names", [ONE_EACH, pytest.param(REST, marks=pytest.mark.slow)], ids=["one of each", "rest"])
def test_sliced_models_load_in_a_process_without_slimlm_and_generate(
    sliced: Path, by_hand: Path, tmp_path: Path, names: list[str]
):
    """Cached or not, padded or not, in a batch or not."""
    check_in_a_fresh_process(
        [sliced / name for name in names] + [by_hand / name for name in ("opt", "bloom")], tmp_path
    )


def narrowed(source: Path, path: Path, widths: dict[str, int]) -> Path:
    """A copy of a model in which all units beyond these widths do nothing."""
    model, declared = AutoModelForCausalLM.from_pretrained(source), stream(source).family
    axes = {"mlp": declared.mlp, "groups": declared.groups}
    with torch.no_grad():
        for block in model.get_submodule(declared.blocks):
            for axis, width in widths.items():
                name = axes[axis].columns[0]
                inside = dict(block.named_parameters())
                if name not in inside and f"{name}.weight" not in inside:
                    continue  # a layer without experts
                weight = inside[name] if name in inside else matrix(block, name)
                units = {"mlp": weight.shape[-1], "groups": 2}[axis]
                weight[..., weight.shape[-1] // units * width :] = 0
    model.save_pretrained(path)
    copy_companions(source, path)
    return path


@pytest.mark.parametrize(
    "name",
    [name for name in (*KINDS, "bloom post-norm", "phi3", "qwen3", "starcoder2") if family_of(family_config(name)).mlp],
)
def test_narrowing_is_exact_where_the_units_that_go_do_nothing(tinies: Path, tmp_path: Path, name: str):
    groups = family_of(family_config(name)).groups is not None and "num_key_value_heads" in SETTINGS[name]
    widths = {"mlp": 16 if "moe" in name else 40, **({"groups": 1} if groups else {})}
    path = narrowed(tinies / name, tmp_path / "dense", widths)
    tokens = random_tokens(12, 24)
    recipe = SliceStep(
        model="x", widths=",".join(f"{axis}={width}" for axis, width in widths.items()), weighting="none"
    )
    out = run(stream(path), recipe, list(tokens.split(4)), tmp_path, path)
    before = logits_of(path, tokens[:2])
    assert (logits_of(out, tokens[:2]) - before).abs().max() < 2e-3 * before.abs().max()


def pruned(tinies: Path, name: str, out: Path, *later: dict, **settings) -> dict:
    shared = {
        "model": str(tinies / name), "dataset": str(tinies / "tokens.npy"), "num_calibration_samples": 20,
        "max_seq_length": 32, "measure": False, "output_dir": str(out),
    }  # fmt: skip
    return compress(in_steps({**shared, **settings}, *later), overwrite=True).manifest


@pytest.mark.parametrize("name", SETTINGS)
def test_every_matrix_is_pruned_by_the_exact_count_and_nothing_else_is_touched(tinies: Path, tmp_path: Path, name: str):
    method = "sparsegpt" if name in KINDS else "magnitude"
    manifest = pruned(tinies, name, tmp_path / "out", method=method, sparsity=0.5)
    assert manifest["sparsity"]["achieved"] == 0.5
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tinies / name, tmp_path / "out"))
    for known in stream(tinies / name).blocks:
        block = after.get_submodule(known.path)
        for linear in known.family.linears:
            assert 2 * int((matrix(block, linear) == 0).sum()) == matrix(block, linear).numel()
            matrix(block, linear).zero_()
            matrix(before.get_submodule(known.path), linear).zero_()
    state = after.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in before.state_dict().items())


@pytest.mark.parametrize("name", KINDS)
def test_aiming_at_the_dense_model_comes_nearer_to_it(tinies: Path, tmp_path: Path, name: str):
    tokens = random_tokens(20, 32)[:4]
    dense = logits_of(tinies / name, tokens)
    errors = []
    for method in ("sparsegpt", "slimlm"):
        manifest = pruned(tinies, name, tmp_path / "out", method=method, sparsity=0.2)
        assert manifest["sparsity"]["achieved"] == pytest.approx(0.2, abs=1e-3)
        errors.append(float((logits_of(tmp_path / "out", tokens) - dense).norm() / dense.norm()))
    assert errors[1] < errors[0]


# Norms after each sum change the stream even where nothing is added to it.
@pytest.mark.parametrize("name", [name for name in KINDS if name != "opt post-norm"])
def test_a_block_that_does_nothing_can_go(tinies: Path, tmp_path: Path, name: str):
    """What differs from block to block goes with it, and the refit finds nothing to make up for."""
    model, known = AutoModelForCausalLM.from_pretrained(tinies / name), stream(tinies / name)
    with torch.no_grad():
        block = model.get_submodule(known.family.block(0))
        parameters = dict(block.named_parameters())
        for parameter in set(known.blocks[0].family.writing) & parameters.keys():
            parameters[parameter].zero_()
        for norm in known.family.norms:
            if norm.after:
                block.get_submodule(norm.after).weight.fill_(-known.family.offset)
    model.save_pretrained(tmp_path / "dense")
    copy_companions(tinies / name, tmp_path / "dense")
    tokens = random_tokens(12, 24)
    recipe = SliceStep(model="x", widths="blocks=2", weighting="none")
    path = tmp_path / "dense"
    out = run(stream(path), recipe, list(tokens.split(4)), tmp_path / "run", path)
    before = logits_of(path, tokens[:2])
    assert (logits_of(out, tokens[:2]) - before).abs().max() < 2e-3 * before.abs().max()


def test_an_expert_that_saw_too_few_tokens_is_pruned_by_magnitude_and_reported(tinies: Path, tmp_path: Path):
    path, name = tmp_path / "model", "model.layers.1.mlp.experts"
    model = AutoModelForCausalLM.from_pretrained(tinies / "mixtral")
    with torch.no_grad():
        norm = model.model.layers[1].post_attention_layernorm
        norm.weight.fill_(1.0)
        router = model.model.layers[1].mlp.gate.weight
        router[3] = router[:3].sum(0) * 0  # its logit is zero, and
        router[:3] = torch.eye(32)[:3] * 50  # those of two others nearly always above
    model.save_pretrained(path)
    copy_companions(tinies / "mixtral", path)
    recipe = one_step(
        model=str(path), method="sparsegpt", sparsity=0.5, dataset=str(tinies / "tokens.npy"), seed=0,
        num_calibration_samples=1, max_seq_length=8, measure=False, output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    starved = compress(recipe).manifest["method"]["starved_experts"]
    assert starved[f"{name}.gate_up_proj.3"] < 8
    dense = AutoModelForCausalLM.from_pretrained(path).get_parameter(f"{name}.gate_up_proj")[3]
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_parameter(f"{name}.gate_up_proj")[3]
    smallest = dense.abs() <= dense.abs().flatten().kthvalue(dense.numel() // 2).values
    assert torch.equal(pruned, dense.masked_fill(smallest, 0))
    settings = recipe.steps[0].model_dump(include={"model", "dataset", "max_seq_length", "measure"})
    sliced = one_step(**settings, num_calibration_samples=5, widths="mlp=16", output_dir=str(tmp_path / "sliced"))
    starved = compress(sliced).manifest["method"]["refit"]["starved_experts"]
    name, _, expert = f"model.layers.{next(iter(starved))}".rpartition(".")
    before, after = (
        AutoModelForCausalLM.from_pretrained(place).get_parameter(name)[int(expert)]
        for place in (path, tmp_path / "sliced")
    )
    kept = before.square().sum(0).topk(16).indices.sort().values
    assert torch.allclose(after, before[:, kept], atol=1e-6)


def test_an_architecture_nobody_declared_is_named_with_the_nearest_one(tiny_llama: Path):
    class Llama3Config(LlamaConfig):
        model_type = "llama3"

    with pytest.raises(UserError, match="'llama3' is not supported; did you mean 'llama'"):
        family_of(Llama3Config())


def test_weights_that_nobody_declared_stop_the_run_with_their_names(tinies: Path, monkeypatch: pytest.MonkeyPatch):
    model = stream(tinies / "qwen3")
    monkeypatch.setattr(model, "family", FAMILIES["mistral"])
    for plan, verb in ((plan_slice, "slice"), (plan_rotate, "slice")):
        with pytest.raises(UserError, match=rf"does not know how to {verb}: model\.layers\.0\.self_attn\.q_norm"):
            plan(model, RotateStep(model="x") if plan is plan_rotate else SliceStep(model="x", sparsity=0.2))


def test_a_width_that_the_configs_class_refuses_is_not_tried(tinies: Path, tmp_path: Path):
    """Phi-3 with long context has factors for its rotary embedding, whose number its class derives from hidden_size."""
    config = family_config("phi3")
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config.rope_parameters = {**factors, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 64}
    model = stream(build_tiny(config, tmp_path / "long"))
    with pytest.raises(UserError, match="Phi3Config has no model of hidden=24"):
        plan_slice(model, SliceStep(model="x", widths="hidden=24"))
    assert {split.hidden for split in candidates(Shapes(Layout(model)), SliceStep(model="x", sparsity=0.02))} == {32}


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox sequential", "qwen2"])
def test_heads_cut_in_proportion_to_the_stream_need_no_other_class(tinies: Path, tmp_path: Path, name: str):
    layout = Layout(stream(tinies / name))
    widths = f"hidden=16,groups={layout.dense.groups // 2}"
    path = run(layout.model, SliceStep(model="x", widths=widths), [random_tokens(10, 24)],
               tmp_path, tinies / name)  # fmt: skip
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"] == name.partition(" ")[0]
    assert "auto_map" not in config
    tokens = random_tokens(2, 16, seed=3)
    assert torch.equal(walked_logits(stream(path), [tokens])[0], logits_of(path, tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "carrier", lambda self, widths: self.model.family.carrier)
        other = run(layout.model, SliceStep(model="x", widths=widths), [random_tokens(10, 24)],
                    tmp_path / "other", tinies / name)  # fmt: skip
    assert (logits_of(path, tokens) - logits_of(other, tokens)).abs().max() < 1e-5
    other = config_of(layout, replace(layout.dense, hidden=16))
    assert other.model_type == {"gpt_neox": "narrow_gpt_neox", "qwen2": "llama"}[name.partition(" ")[0]]


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gpt2", "opt tied", "granite", "falcon", "bloom"])
def test_parameters_are_counted_as_they_will_be(tinies: Path, name: str):
    shapes = Shapes(Layout(stream(tinies / name)))
    dense, tied = shapes.dense, shapes.model.head_is_tied
    some = [replace(dense, hidden=24, tied=tied), replace(dense, hidden=16, blocks=(0, 2)), replace(dense, blocks=(1,))]
    some += [replace(dense, mlp=40)] if dense.mlp else []
    some += [replace(dense, groups=1, hidden=8)] if dense.groups else []
    for widths in some:
        counted = sum(torch.Size(shape).numel() for shape in shapes.of(widths).values())
        assert shapes.parameters(widths) == counted, widths


def test_what_a_sliced_model_needs_goes_with_it_when_it_is_pruned(by_hand: Path):
    """That it loads is seen together with others, in a process of their own."""
    assert (by_hand / "opt" / "model" / "modeling_narrow.py").is_file()


def test_the_norm_behind_an_embedding_stays_as_long_as_the_stream_and_then_goes_into_a_table_of_its_own(
    tinies: Path, by_hand: Path, tmp_path: Path
):
    path, tokens = by_hand / "bloom" / "model", random_tokens(3, 24)
    before = logits_of(path, tokens)
    model = stream(path)
    assert model.head_is_tied
    assert model.family.embedding_norm in model.outside
    recipe = RotateStep(model="x", weighting="none")
    rotated = run(model, recipe, [tokens], tmp_path / "rotated", path)
    assert (logits_of(rotated, tokens) - before).abs().max() < 1e-4
    assert not stream(rotated).head_is_tied
    assert model.family.embedding_norm not in stream(rotated).outside
    layout = Layout(stream(tinies / "bloom"))
    assert not any(split.tied for split in candidates(Shapes(layout), SliceStep(model="x", sparsity=0.1)))
    with pytest.raises(UserError, match="tied=1: the norm behind the embedding"):
        plan_slice(layout.model, SliceStep(model="x", widths="hidden=24,tied=1"))


def test_a_run_that_keeps_the_stream_goes_on_where_it_died(tinies: Path, tmp_path: Path, monkeypatch):
    settings = {"sparsity": 0.03, "weighting": "loss"}
    pruned(tinies, "gemma2", tmp_path / "whole", **settings)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    notes = json.loads((tmp_path / "whole" / "slimlm.json").read_text())["method"]
    for number in (2, 5, 7, 9):
        recipe = one_step(
            model=str(tinies / "gemma2"), dataset=str(tinies / "tokens.npy"), num_calibration_samples=20,
            max_seq_length=32, measure=False, output_dir=str(tmp_path / f"out{number}"), **settings,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            die_after_record(patch, number)
            with pytest.raises(KeyboardInterrupt):
                compress(recipe)
        result = compress(recipe, resume=True)
        assert (result.output_dir / "model.safetensors").read_bytes() == expected
        assert result.manifest["method"]["basis"] == notes["basis"] == "the stream's own"


def test_a_stream_that_cannot_be_rotated_keeps_its_width_and_the_reason_is_told(tinies: Path):
    with pytest.raises(UserError, match="'gemma2' cannot be rotated: its norms on what blocks write"):
        plan_rotate(stream(tinies / "gemma2"), RotateStep(model="x"))
    with pytest.raises(UserError, match="hidden_size stays 32, as 'olmo2' cannot be rotated"):
        plan_slice(stream(tinies / "olmo2"), SliceStep(model="x", widths="hidden=24"))


def test_the_table_of_the_docs_is_that_of_the_declarations():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert models_table() in page, "run `slimlm models --markdown` and put its table into docs/models.md"
