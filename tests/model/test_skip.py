"""Modules that the user wants to stay dense stay so to the last bit, whatever the method."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from slimlm import compress
from slimlm.check import How, check
from slimlm.checkpoint.manifest import read_manifest
from slimlm.errors import UserError
from slimlm.forecast import forecast
from slimlm.model.skip import skip_modules
from slimlm.prober import Prober
from slimlm.progress import Progress
from slimlm.recipe import SliceStep, make_recipe, one_step
from slimlm.stages import check_later, later_steps
from tests.conftest import CONFIGS, SIZES, build_tiny, in_steps, stream
from tests.families.configs import family_config

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "global": {"method": "magnitude", "allocation": "global"},
    "wanda": {"method": "wanda"},
    "owl": {"method": "wanda", "allocation": "owl"},
    "alphapruning": {"method": "wanda", "allocation": "alphapruning"},
    "pq": {"method": "wanda", "allocation": "pq"},
    "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
    "solved": {"method": "sparsegpt", "allocation": "solved"},
    "tiles": {"method": "sparsegpt", "pattern": "4x4", "sparsity": 0.5},
    "slimlm": {"method": "slimlm"},
    "obc": {"method": "obc"},
    "mfac": {"method": "mfac", "fisher_samples": 16},
    "woodfisher": {"method": "woodfisher", "fisher_samples": 16},
    "shots": {"method": "magnitude", "shots": 2},
    "slice": {"method": "slice", "sparsity": 0.016},
}


def run(path: Path, tmp_path: Path, *later: dict[str, Any], **settings: Any) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("The old house stood at the end of the lane, and nobody had lived there since. " * 60)
    data = {"dataset": str(text), "num_calibration_samples": 8, "max_seq_length": 32, "measure": False}
    if not {"pattern", "widths"} & settings.keys() and settings.get("method") != "rotate":
        settings.setdefault("sparsity", 0.5)
    compress(in_steps({"model": str(path), **data, "output_dir": str(tmp_path / "out"), **settings}, *later))
    return tmp_path / "out"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_is_skipped_stays_to_the_last_bit(name: str, tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    skip = ["*.mlp", "lm_head"] if name == "slice" else ["*.o_proj", "model.layers.1", "model.layers.2.mlp", "lm_head"]
    out = run(path, tmp_path, skip=skip, **METHODS[name])
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    spared = ("mlp", "lm_head") if name == "slice" else ("o_proj", "layers.1.", "layers.2.mlp", "lm_head")
    linears = [key for key in before if "proj" in key or "lm_head" in key]
    for key in linears:
        if any(part in key for part in spared):
            assert torch.equal(before[key], after[key]), key
        else:
            assert before[key].shape != after[key].shape or not torch.equal(before[key], after[key]), key
    manifest = read_manifest(out)
    assert manifest is not None
    modules = [key for key in linears if any(part in key for part in spared)]
    assert manifest["skipped"] == {"modules": len(modules), "weights": sum(before[key].numel() for key in modules)}
    assert manifest["recipe"]["skip"] == skip
    if name != "slice":
        assert manifest["sparsity"]["zeros_in_pruned_matrices"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("method", ["sparsegpt", "slimlm", "slice"])
def test_experts_are_skipped_with_their_module(method: str, tmp_path: Path):
    path = build_tiny(family_config("qwen3_moe"), tmp_path / "model")
    sparsity = 0.02 if method == "slice" else 0.5
    out = run(path, tmp_path, method=method, skip=["*.mlp.experts"], sparsity=sparsity)
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    experts = [key for key in before if ".experts." in key]
    assert experts
    assert all(torch.equal(before[key], after[key]) for key in experts)
    assert not all(torch.equal(before[key], after[key]) for key in before if key in after and "o_proj" in key)


@pytest.mark.parametrize("method", ["slimlm", "slice"])
def test_a_skipped_writer_still_shows_the_next_norm_the_dense_stream(method: str, tmp_path: Path):
    """The attention's output stays: the MLP behind it is fitted all the same."""
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    out = run(path, tmp_path, method=method, skip=["*.o_proj"], sparsity=0.03 if method == "slice" else 0.5)
    before, after = load_file(path / "model.safetensors"), load_file(out / "model.safetensors")
    for key in before:
        if "o_proj" in key:
            assert torch.equal(before[key], after[key])
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ("*.oproj", "no linear of the model is called so.*did you mean 'o_proj'"),
        ("model.layers.7", "no linear of the model is called so"),
        ("*", "leaves nothing to compress"),
    ],
)
def test_a_name_that_fits_nothing_is_refused(skip: str, message: str, tiny_llama: Path):
    with pytest.raises(UserError, match=message):
        skip_modules(stream(tiny_llama), [skip])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": "hidden=16"}, "hidden: with --skip it stays"),
        ({"widths": "mlp=16"}, "mlp: with --skip it stays"),
        ({"sparsity": 0.25, "refit": False}, "changes every module"),
        ({"sparsity": 0.25, "basis": "per-block"}, "changes every module"),
        ({"method": "rotate"}, "changes every module"),
        ({"sparsity": 0.9}, "cannot be reached"),
    ],
)
def test_what_would_change_a_skipped_module_is_refused(settings: dict[str, Any], message: str, tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    with pytest.raises(UserError, match=message):
        run(path, tmp_path, skip=["*.mlp"], **settings)


def test_names_come_as_a_list_or_with_commas():
    assert SliceStep(model="x", sparsity=0.5, skip="lm_head, *.o_proj").skip == ["lm_head", "*.o_proj"]
    assert SliceStep(model="x", sparsity=0.5, skip=["a"]).skip == ["a"]
    with pytest.raises(UserError, match="skip"):
        one_step(**{"model": "x", "sparsity": 0.5, "skip": 3})


LAST, HALF = ["model.layers.7"], {"method": "magnitude", "sparsity": 0.5}


@pytest.mark.parametrize(
    "steps",
    [
        [{"method": "wanda", "sparsity": 0.5, "skip": ["model.layers.0.mlp", *LAST, "lm_head"]}],
        [{"method": "slice", "sparsity": 0.03, "skip": ["*.o_proj"]}],
        [HALF, {"method": "wanda", "sparsity": 0.6, "skip": LAST}],
        [{**HALF, "skip": LAST}, {"method": "slice", "sparsity": 0.06}],
    ],
)
def test_a_dry_run_probes_the_blocks_that_it_shows(steps: list[dict[str, Any]], tmp_path: Path, in_process):
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 8})
    path = build_tiny(config, tmp_path / "model")
    (tmp_path / "text.txt").write_text("The old house stood at the end of the lane. " * 60)
    data = {"dataset": str(tmp_path / "text.txt"), "num_calibration_samples": 6, "max_seq_length": 16}
    shared = {"model": str(path), "output_dir": str(tmp_path / "out"), "measure": False, **data}
    recipe = make_recipe({**shared, "steps": steps})
    how = How()
    job = check(recipe.steps[0], how)
    check_later(job, recipe, Progress())
    with closing(Prober()) as prober:
        assert forecast(job, later_steps(job, recipe), how, prober).result > 0


def test_a_later_runs_names_are_checked_before_the_first(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "model")
    then = {"method": "magnitude", "sparsity": 0.6, "skip": ["*.oproj"]}
    with pytest.raises(UserError, match="no linear of the model is called so"):
        run(path, tmp_path, then, method="magnitude")
    assert not (tmp_path / "out.partial").exists()
    then = {"method": "slice", "sparsity": 0.25, "skip": []}  # not what the first run skips
    run(path, tmp_path, then, method="magnitude", sparsity=0.3, skip=["model.layers.1"])
