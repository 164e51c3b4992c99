"""transformers' loading code is not a public interface: these fail first when it changes."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.initialization import TORCH_INIT_FUNCTIONS

from slimlm.checkpoint.hf_internals import checkpoint_tensors, load_tensors, module_names, release
from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.skeleton import build_skeleton, load_config, parameter_count


def test_names_of_a_plain_checkpoint_are_its_own(tiny_llama: Path):
    model = build_skeleton(load_config(tiny_llama))
    names, converted = module_names(model, Checkpoint(tiny_llama).tensors)
    assert all(key == name for key, name in names.items())
    assert not converted


def test_a_base_models_names_get_their_prefix(tiny_llama: Path):
    model = build_skeleton(load_config(tiny_llama))
    names, _ = module_names(model, ["layers.0.mlp.up_proj.weight", "norm.weight"])
    assert names == {
        "layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "norm.weight": "model.norm.weight",
    }


def test_a_skeleton_costs_no_random_numbers(tiny_llama: Path, monkeypatch):
    drawn = []
    for name in ("normal_", "zeros_", "ones_"):
        monkeypatch.setitem(TORCH_INIT_FUNCTIONS, name, lambda tensor, *_, **__: drawn.append(tensor))
    model = build_skeleton(load_config(tiny_llama))
    assert not drawn
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(3))  # not one of a skeleton's
    model.model.layers[0].mlp.up_proj._is_hf_initialized = False
    model.initialize_weights()
    assert len(drawn) == 1


def test_part_of_a_model_loads_and_is_released(tiny_llama: Path):
    checkpoint = Checkpoint(tiny_llama)
    model = build_skeleton(load_config(tiny_llama))
    key = "model.layers.1.mlp.up_proj.weight"
    load_tensors(model, {key: checkpoint.tensors[key]}, torch.device("cpu"), torch.float32)
    assert torch.equal(model.get_parameter(key), checkpoint.read(key))
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").is_meta
    release(model.model.layers[1])
    assert model.get_parameter(key).is_meta


def test_fused_experts_round_trip_through_the_same_conversion_as_from_pretrained(tmp_path: Path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    checkpoint, model = Checkpoint(tmp_path), build_skeleton(config)
    assert module_names(model, checkpoint.tensors)[1]
    load_tensors(model, checkpoint.tensors, torch.device("cpu"), torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reference[name]), name
    back = checkpoint_tensors(model, model.state_dict())
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)


def test_tied_parameters_count_once(tmp_path: Path):
    from tests.conftest import CONFIGS

    untied, tied = (parameter_count(build_skeleton(CONFIGS[name])) for name in ("llama", "llama-tied"))
    assert untied - tied == 4096 * 32
    for name in ("llama", "llama-tied"):
        whole = AutoModelForCausalLM.from_config(CONFIGS[name])
        assert parameter_count(build_skeleton(CONFIGS[name])) == sum(p.numel() for p in whole.parameters())
