import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slimlm.checkpoint.companions import copy_companions
from slimlm.checkpoint.skeleton import parameter_count
from slimlm.errors import UserError
from slimlm.modeling import own_files
from slimlm.recipe import SliceStep
from slimlm.slice.per_block import plan_per_block
from tests.conftest import CONFIGS, build_tiny, logits_of, random_tokens, stream
from tests.families.configs import family_config
from tests.helpers import carried_out, run_at


def sliced(path: Path, tokens: torch.Tensor, out: Path, width: int) -> Path:
    run = run_at(stream(path), list(tokens.split(4)), out, basis="per-block", widths=f"hidden={width}", dtype="float32")
    plan = carried_out(run).plan
    copy_companions(path, out / "model")
    shutil.copy(*own_files(plan.config), out / "model")
    assert sum(tensor.numel() for tensor in load_file(out / "model" / "model.safetensors").values()) == plan.parameters
    return out / "model"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biased", "opt", "opt tied", "phi"])
def test_without_slicing_the_logits_stay(tmp_path: Path, name: str):
    """With LayerNorm, whose mean goes into what is written, and in parallel blocks, too."""
    config = CONFIGS[name] if name in CONFIGS else family_config(name)
    path, tokens = build_tiny(config, tmp_path / name), random_tokens(6, 24)
    rotated = sliced(path, tokens, tmp_path / "out", 32)
    assert (logits_of(path, tokens) - logits_of(rotated, tokens)).abs().max() < 2e-4


def test_it_is_the_algorithm_of_the_paper_written_as_a_loop(tiny_llama: Path, tmp_path: Path):
    """Algorithm 1 and appendix A.1 on the stock model's modules, holding everything in memory."""
    tokens, width = random_tokens(9, 16), 20
    got = load_file(sliced(tiny_llama, tokens, tmp_path / "out", width) / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)
    eps, hidden = model.config.rms_norm_eps, 32
    norm = lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) / hidden + eps)  # noqa: E731
    linear = torch.nn.functional.linear

    def pca(x: torch.Tensor) -> torch.Tensor:
        gram = x.reshape(-1, hidden).double().T @ x.reshape(-1, hidden).double()
        gram += 0.01 * gram.diagonal().mean() * torch.eye(hidden)
        return torch.linalg.eigh(gram).eigenvectors.flip(-1).float()

    def attend(layer, q, k, v, x):
        kinds = (linear(norm(x), weight).unflatten(-1, (-1, 8)).transpose(1, 2) for weight in (q, k, v))
        positions = torch.arange(x.shape[1])[None]
        cos, sin = (table[:, None] for table in model.model.rotary_emb(x, positions))
        turn = lambda y: y * cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * sin  # noqa: E731
        query, key, value = kinds
        key, value = (y.repeat_interleave(2, 1) for y in (turn(key), value))
        out = torch.nn.functional.scaled_dot_product_attention(turn(query), key, value, is_causal=True)
        return linear(out.transpose(1, 2).flatten(-2), layer.self_attn.o_proj.weight)

    x = model.model.embed_tokens(tokens)
    basis = pca(x)[:, :width]
    expected = {"model.embed_tokens.weight": model.model.embed_tokens.weight @ basis}
    x = x @ basis
    for index, layer in enumerate(model.model.layers):
        name, last = f"model.layers.{index}", index == 2
        gain = layer.input_layernorm.weight
        q, k, v = (getattr(layer.self_attn, f"{r}_proj").weight * gain @ basis for r in "qkv")
        expected |= {f"{name}.self_attn.{r}_proj.weight": w for r, w in zip("qkv", (q, k, v), strict=True)}
        middle = x @ basis.T + attend(layer, q, k, v, x)
        between = pca(middle)[:, :width]
        expected[f"{name}.attn_shortcut.weight"] = between.T @ basis
        x, gain = middle @ between, layer.post_attention_layernorm.weight
        gate, up = (getattr(layer.mlp, f"{r}_proj").weight * gain @ between for r in ("gate", "up"))
        expected |= {f"{name}.mlp.gate_proj.weight": gate, f"{name}.mlp.up_proj.weight": up}
        written = linear(layer.mlp.act_fn(linear(norm(x), gate)) * linear(norm(x), up), layer.mlp.down_proj.weight)
        after = x @ between.T + written
        basis = pca(after) if last else pca(after)[:, :width]
        expected[f"{name}.mlp_shortcut.weight"] = basis.T @ between
        x = after @ basis
    expected["lm_head.weight"] = model.lm_head.weight * model.model.norm.weight @ basis
    for name, tensor in expected.items():
        assert torch.allclose(got[name].abs(), tensor.abs(), atol=2e-3), name  # a direction's sign is free


def test_it_loads_where_slimlm_cannot_be_imported_and_generates(tiny_llama: Path, tmp_path: Path):
    tokens = random_tokens(6, 24)
    path = sliced(tiny_llama, tokens, tmp_path / "out", 24)
    script = (
        "import sys; sys.modules['slimlm'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(path)!r}, trust_remote_code=True).eval()\n"
        "tokens = torch.arange(1, 9)[None]\n"
        "a, b = (model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))\n"
        "assert torch.equal(a, b)\n"
        "print(f'{model(tokens).logits.double().sum().item():.6f}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env={"HF_HOME": str(tmp_path / "hub"), "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(
        logits_of(path, torch.arange(1, 9)[None]).double().sum().item(), abs=1e-3
    )


@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.4])
def test_shortcuts_count_as_parameters(tmp_path: Path, sparsity: float):
    config = CONFIGS["llama-biased"].__class__(
        **{**CONFIGS["llama-biased"].to_dict(), "hidden_size": 128, "vocab_size": 64}
    )
    model = stream(build_tiny(config, tmp_path / "model"))
    plan = plan_per_block(model, SliceStep(model="x", basis="per-block", sparsity=sparsity, round_to=1))
    assert 1 - plan.parameters / parameter_count(model.model) == pytest.approx(sparsity, abs=0.01)
    assert plan.parameters == sum(torch.Size(spec.shape).numel() for spec in plan.tensors.values())


def test_other_families_are_refused_by_name(tmp_path: Path):
    model = stream(build_tiny(CONFIGS["mistral"], tmp_path / "model"))
    with pytest.raises(UserError, match="not for 'mistral'"):
        plan_per_block(model, SliceStep(model="x", basis="per-block", sparsity=0.2))
